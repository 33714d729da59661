"""Runs in the guest: write to every table of the database `shop` without a pause, until standard input ends.

    python3 writers.py SOCKET SESSIONS

Each session is a connection of its own, and each of its rows has the session's next number: a gap shows. The numbers
go on where an earlier run ended. Prints ``writing`` when every session has written; for each line of standard input it
prints how long the longest statement of any session took since the last such line, in seconds.
"""

import sys
import threading
import time

import pymysql

ENGINES = ("innodb", "myisam", "aria")
_PAUSE_S = 0.2


class Session:
    """One connection, and the thread that writes through it: a row, then the counter, in each engine's tables."""

    def __init__(self, socket: str, number: int) -> None:
        self._connection = pymysql.connect(unix_socket=socket, user="root", database="shop", autocommit=True)
        self._number = number
        self._begun: float | None = None
        self._longest_s = 0.0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run)
        self.has_written = threading.Event()
        self.stopping = threading.Event()
        self.failure: Exception | None = None
        self._thread.start()

    def _run(self) -> None:
        try:
            row = self._execute(f"SELECT COALESCE(MAX(n), 0) FROM innodb WHERE session = {self._number}")
            assert row is not None
            number = int(row[0])
            while not self.stopping.is_set():
                number += 1
                for engine in ENGINES:
                    self._execute(
                        f"INSERT INTO {engine} VALUES ({self._number}, {number}, REPEAT('x', {number} % 200))"
                    )
                for engine in ENGINES:
                    self._execute(f"UPDATE {engine}_counter SET n = n + 1")
                self._execute("BEGIN")
                self._execute(f"UPDATE account SET balance = balance - {number} WHERE id = {self._number}")
                self._execute(f"UPDATE account SET balance = balance + {number} WHERE id = 0")
                self._execute("COMMIT")
                self.has_written.set()
                time.sleep(_PAUSE_S)
        finally:
            self.has_written.set()  # where it failed that is said on standard error

    def _execute(self, statement: str) -> "tuple[int, ...] | None":
        with self._lock:
            self._begun = time.monotonic()
        with self._connection.cursor() as cursor:
            cursor.execute(statement)
            row = cursor.fetchone()
        with self._lock:
            self._longest_s = max(self._longest_s, time.monotonic() - self._begun)
            self._begun = None
        return row

    def longest_s(self) -> float:
        """Return how long the longest statement took since the last call; one that runs still counts with its age."""
        with self._lock:
            running_s = time.monotonic() - self._begun if self._begun is not None else 0.0
            longest_s, self._longest_s = max(self._longest_s, running_s), 0.0
            return longest_s

    def finish(self) -> None:
        """Let the thread come to an end."""
        self.stopping.set()
        self._thread.join()
        self._connection.close()


def main() -> None:
    socket, count = sys.argv[1], int(sys.argv[2])
    sessions = [Session(socket, number) for number in range(1, count + 1)]
    for session in sessions:
        session.has_written.wait()
    print("writing", flush=True)
    for _line in sys.stdin:
        print(max(session.longest_s() for session in sessions), flush=True)
    for session in sessions:
        session.finish()
    print("done", flush=True)


if __name__ == "__main__":
    main()

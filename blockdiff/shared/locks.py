"""Who holds locks and leases on files: the one reader of the kernel's list.

Shipped to the host: standard library only, Python 3.6 or newer.
"""

from typing import List


def holders(inode: int, *kinds: str) -> List[str]:
    """Return the process ids, as text, of those that hold one of the `kinds` (such as ``FLOCK``) on a file.

    An inode is enough: the list has other devices than `os.stat` if file systems are on each other. Empty if
    there is no list to read.
    """
    try:
        with open("/proc/locks", encoding="ascii") as file:
            lines = [line.split() for line in file]
    except OSError:
        return []
    return [
        words[4]
        for words in lines
        if len(words) > 5 and words[1] in kinds and words[5].rpartition(":")[2] == str(inode)
    ]

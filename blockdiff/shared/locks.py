"""Who holds locks and leases on files. Only this module reads the kernel's list.

Shipped to the host: standard library only, Python 3.6 or newer.
"""

from typing import List


def holders(inode: int, *kinds: str) -> List[str]:
    """Return the ids, as text, of the processes that hold a lock of one of `kinds` (such as ``FLOCK``) on a file.

    Only the inode is compared: for stacked file systems the list has other device numbers than `os.stat`. The result is
    empty if the list cannot be read.
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

"""The agent: runs in the deploy ramdisk, writes one release to one disk, and restarts."""

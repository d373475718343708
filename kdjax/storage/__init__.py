"""Files and folders on local disks and in object stores: written whole, created once, renamed after a flush, with checksums.

Nothing here knows what the files mean. A store's errors are classified here and nowhere else.
"""

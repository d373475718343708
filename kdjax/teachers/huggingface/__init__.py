"""Hugging Face's model folders, in and out. `Source` is a folder that is there; `export` writes one."""

from kdjax.teachers.huggingface.exporting import check_new, export
from kdjax.teachers.huggingface.importing import Source, is_folder

__all__ = ['Source', 'check_new', 'export', 'is_folder']

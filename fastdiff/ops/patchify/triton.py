"""Patchify and unpatchify as one gather or scatter over output-ordered elements."""
PATCHIFY = UNPATCHIFY = None

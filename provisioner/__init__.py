"""Rebuild bare-metal servers from signed golden images."""

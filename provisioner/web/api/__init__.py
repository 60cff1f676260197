"""The API for operators: `create_app`."""

from .app import create_app as create_app

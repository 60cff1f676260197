"""The client of the operator API."""

from .client import Client as Client

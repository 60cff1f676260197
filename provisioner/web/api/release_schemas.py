"""The shapes in which the operator API shows releases and channels."""

from datetime import datetime
from typing import Any

from pydantic import BaseModel, Field


class ReleaseOut(BaseModel):
    digest: str
    name: str
    image: str
    version: str
    size_bytes: int
    used_bytes: int
    stored_bytes: int
    firmware: list[str]
    release_id: str
    published_at: datetime
    minimum_version: str | None
    expires_at: datetime | None
    revoked_at: datetime | None
    revoked_reason: str | None
    removed_at: datetime | None = Field(description="its bytes are gone since then")
    channels: list[str]


class ReleasesOut(BaseModel):
    releases: list[ReleaseOut]


class ReleaseTestOut(BaseModel):
    digest: str
    at: datetime
    profile: str
    firmware: list[str]
    is_healthy: bool
    detail: dict[str, Any]
    tested_by: str


class ReleaseTestsOut(BaseModel):
    tests: list[ReleaseTestOut]


class ReleaseDetailOut(ReleaseOut):
    """With what its manifest and its builder say; null where its bytes are gone."""

    architecture: str | None
    chunk_bytes: int | None
    parent: str | None
    recipe_digest: str | None
    builder: str | None
    built_at: datetime | None = Field(description="the date of what it was built from")
    packages: dict[str, str]
    attachments: dict[str, str] = Field(description="sha256 by name")
    signed_by: list[str] = Field(description="ids of trusted keys")
    record: dict[str, Any] = Field(description="what the builder noted; nobody signed it")
    tests: list[ReleaseTestOut]


class ChannelOut(BaseModel):
    name: str = Field(description="image:channel, as it is named everywhere")
    image: str
    channel: str
    digest: str
    release_name: str
    moved_at: datetime
    moved_by: str


class ChannelsOut(BaseModel):
    channels: list[ChannelOut]

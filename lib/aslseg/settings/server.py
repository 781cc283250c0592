"""Settings of the server: who reaches it, who may log in, and what it writes into its log."""

from __future__ import annotations

from typing import Literal

from aslseg.settings.base import Section, setting


class ServerSettings(Section):
    """Server."""

    hosts: str = setting(
        "",
        "Names under which clients reach the server, with commas between them; localhost, the machine's own name and "
        "IP addresses are always accepted",
        example="seg.hospital.example",
    )
    origins: str = setting(
        "",
        "Origins of other web servers whose pages may send requests to this one, with commas between them",
        example="https://viewer.hospital.example",
    )
    insecure: bool = setting(
        False,
        "Whether the server may listen on a network without authentication; only where everybody on it may read, "
        "change and delete everything",
        example="true",
    )
    token_file: str = setting(
        "",
        "File with a line `name role hash` for each person who may log in, made by `aslseg token`; empty: no login",
        unit="file",
        example="/etc/aslseg/tokens",
    )
    max_upload_gb: float = setting(4.0, "Largest request that is accepted", unit="GB", example="1", gt=0)
    log_format: Literal["text", "json"] = setting(
        "text", "Form of the server's log: lines of text, or one JSON object a line", example="json"
    )
    log_case_ids: Literal["plain", "hashed"] = setting(
        "plain",
        "How ids of scans, which may be names of patients, stand in the server's log: plain, or hashed with a key "
        "that lies in home",
        example="hashed",
    )

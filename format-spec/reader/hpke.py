"""HPKE as key mode 1 uses it: RFC 9180 base mode, DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM, export only."""
from __future__ import annotations

import hashlib
import hmac
import struct

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from checks import Damaged

KEM = b"KEM" + struct.pack(">H", 0x20)
SUITE = b"HPKE" + struct.pack(">HHH", 0x20, 0x01, 0x02)

def _extract(suite: bytes, salt: bytes, label: bytes, ikm: bytes) -> bytes:
    """LabeledExtract (RFC 9180, 4)."""
    return hmac.digest(salt or bytes(32), b"HPKE-v1" + suite + label + ikm, hashlib.sha256)

def _expand(suite: bytes, prk: bytes, label: bytes, info: bytes) -> bytes:
    """LabeledExpand of 32 bytes: one block of HKDF-Expand."""
    labeled = struct.pack(">H", 32) + b"HPKE-v1" + suite + label + info
    return hmac.digest(prk, labeled + b"\x01", hashlib.sha256)

def export(private: bytes, encapsulated: bytes, info: bytes, exporter_context: bytes, where: str) -> bytes:
    """What the encapsulated key exports for the holder of the private key, 32 bytes."""
    key = X25519PrivateKey.from_private_bytes(private)
    public = key.public_key().public_bytes_raw()
    try:
        shared = key.exchange(X25519PublicKey.from_public_bytes(encapsulated))
    except ValueError:
        raise Damaged(f"{where}: the encapsulated key is none") from None
    secret = _extract(KEM, b"", b"eae_prk", shared)
    secret = _expand(KEM, secret, b"shared_secret", encapsulated + public)
    context = b"\x00" + _extract(SUITE, b"", b"psk_id_hash", b"") + _extract(SUITE, b"", b"info_hash", info)
    exporter = _expand(SUITE, _extract(SUITE, secret, b"secret", b""), b"exp", context)
    return _expand(SUITE, exporter, b"sec", exporter_context)

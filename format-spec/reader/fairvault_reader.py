#!/usr/bin/env python3
"""An independent reader of fairvault repositories, format version 1.

It is written from SPEC.md and proto/fairvault.proto alone and shares no code with the engine. It is there to show
that the specification is enough: whoever has a repository, a key, the .proto and this folder gets the data back. It
reads repositories in a directory, verifies what it reads, and never writes to them. Numbers in comments are sections
of SPEC.md.
"""
from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import struct
import sys
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Callable, Iterator, NoReturn, Optional

import google_crc32c
import zstandard
from blake3 import blake3
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

import hpke
import pages
import records
from checks import Damaged, Failure, Unsupported, allowed, require, supported

PROTO_FILE = Path(__file__).resolve().parent.parent / "proto" / "fairvault.proto"
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
HEADER_LEN, SECTION_HEADER_LEN, TAG_LEN = 80, 16, 16
DATA, METADATA = 0, 1
PACK, ROOT, LOG_ENTRY, WAL_SEGMENT, WAL_PIECE, WAL_FILE, PIECE_SEAL = 1, 3, 4, 6, 7, 8, 11
KNOWN_KINDS = range(1, 12)
# Whose block maps count (11): 1 is faulty, and of later ones nothing is known here.
MAP_PARSERS, MAX_BLOCK = {2}, 0xFFFFFFFF
WRITER_MAY = {"begin", "announce", "commit", "abort", "archive_epoch", "incarnation", "operation"}
# Limits (12).
MAX_PACK, MAX_FRAMES, MAX_CHUNK, MAX_SEGMENT_CHUNK = 64 * MIB, 1_048_576, 512 * KIB, 4 * MIB
MAX_SECTION, MAX_LOG_SECTION, MAX_SECTIONS = 256 * MIB, 16 * MIB, 65_536
MAX_MANIFEST_SEGMENT, MAX_PATH, MAX_SLOT, MAX_JSON = 64 * MIB, 4096, 64 * KIB, 64 * KIB
MAX_ARGON2_KIB, MAX_ARGON2_PASSES, MAX_ARGON2_LANES = 2 * GIB // KIB, 64, 64

def load_messages(path: Path) -> dict[str, Any]:
    """Message classes from the .proto. Enums become int32, which is the same on the wire; maps are left out."""
    text = re.sub(r"//[^\n]*", "", path.read_text("utf-8"))
    file = descriptor_pb2.FileDescriptorProto(name="fairvault.proto", syntax="proto3", package="fairvault.v1")
    enums = re.findall(r"\benum (\w+)", text)
    for name, body in re.findall(r"\bmessage (\w+) \{((?:[^{}]|\{[^{}]*\})*)\}", text):
        message, oneof = file.message_type.add(name=name), re.search(r"oneof (\w+) \{[^}]*\}", body)
        if oneof:
            message.oneof_decl.add(name=oneof[1])
        for found in re.finditer(r"(repeated )?\b(\w+) (\w+) = (\d+);", body):
            field = message.field.add(name=found[3], number=int(found[4]))
            field.label = field.LABEL_REPEATED if found[1] else field.LABEL_OPTIONAL
            kind = "int32" if found[2] in enums else found[2]
            field.type = getattr(field, "TYPE_" + kind.upper(), field.TYPE_MESSAGE)
            if field.type == field.TYPE_MESSAGE:
                field.type_name = ".fairvault.v1." + kind
            if oneof and oneof.start() < found.start() < oneof.end():
                field.oneof_index = 0
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {m.name: message_factory.GetMessageClass(pool.FindMessageTypeByName("fairvault.v1." + m.name))
            for m in file.message_type}

MESSAGES = load_messages(PROTO_FILE)

def decode(message: str, raw: bytes, where: str) -> Any:
    """Parse a protobuf message."""
    try:
        return MESSAGES[message].FromString(raw)
    except DecodeError as error:
        raise Damaged(f"{where}: not a {message}: {error}") from None

class Header:
    """The first 80 bytes of a binary object (2)."""
    def __init__(self, raw: bytes, kind: int, where: str) -> None:
        """Check a header that must be of `kind`."""
        require(len(raw) == HEADER_LEN and raw[:4] == b"FVLT", f"{where}: not a fairvault object")
        version, found, features, epoch, mode = struct.unpack_from("<BBHIB", raw, 4)
        supported(version == 1, f"{where}: format version {version}")
        supported(found in KNOWN_KINDS, f"{where}: object kind {found}")
        supported(features in ((0, 1) if found == ROOT else (0,)), f"{where}: feature bits {features:#x}")
        supported(mode <= 1, f"{where}: key mode {mode}")
        require(found == kind, f"{where}: object kind {found} where {kind} belongs")
        require(not any(raw[13:16]) and (mode == 1 or not any(raw[48:])), f"{where}: a header byte is not zero")
        self.raw, self.epoch = raw, epoch

def hkdf(ikm: bytes, salt: bytes, info: bytes) -> bytes:
    """HKDF-SHA-256, 32 bytes."""
    return HKDF(algorithm=SHA256(), length=32, salt=salt, info=info).derive(ikm)

def unseal(key: bytes, ordinal: int, sealed: bytes, aad: bytes, where: str) -> bytes:
    """Open AES-256-GCM."""
    try:
        return AESGCM(key).decrypt(bytes(4) + ordinal.to_bytes(8, "big"), sealed, aad)
    except InvalidTag:
        raise Damaged(f"{where}: does not open: altered, or not sealed for this place") from None

def unzstd(body: bytes, limit: int, where: str) -> bytes:
    """What exactly one zstd frame decodes to; refused if that is more than `limit`."""
    try:
        require(zstandard.frame_content_size(body) <= limit, f"{where}: decodes to more than {limit} bytes")
        return zstandard.ZstdDecompressor().decompress(body, max_output_size=max(limit, 1), allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Damaged(f"{where}: {error}") from None

def decompress(codec: int, body: bytes, plain_len: int, where: str) -> bytes:
    """Undo a codec that the caller found to be known; makes no more than the limits allow."""
    if codec == 1:
        body = unzstd(body, plain_len, where)
    elif codec == 2:
        body = pages.Decoder(unzstd(body, pages.max_transformed(plain_len), where), plain_len, where).decode()
    elif codec == 3:
        body = records.decode(unzstd(body, records.max_transformed(plain_len), where), plain_len, where)
    require(len(body) == plain_len, f"{where}: the decoded length is not {plain_len}")
    return body

def open_named(path: Path, where: str) -> BinaryIO:
    """Open an object that something else in the repository names; that it is absent is damage."""
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise Damaged(f"{where}: absent") from None

def read_small(path: Path, limit: int, where: str) -> bytes:
    """Read a whole file of at most `limit` bytes."""
    with open_named(path, where) as stream:
        raw = stream.read(limit + 1)
    require(len(raw) <= limit, f"{where}: longer than {limit} bytes")
    return raw

class Keys:
    """The key bundles that the user's key or passphrase opens, and what is derived from them (2, 9)."""

    def __init__(self, folder: Path, repository_id: bytes, key: Optional[bytes], passphrase: Optional[bytes]) -> None:
        self.folder, self.repository_id, self.stanza_id = folder, repository_id, b""
        self.key, self.passphrase, self.given = key, passphrase, key is not None or passphrase is not None
        self.epochs: dict[int, Any] = {}  # what the log says of each epoch
        self.bundle = lru_cache(None)(self._bundle)
        self.object_key = lru_cache(4096)(self._derive)  # (header, role)

    def _bundle(self, epoch: int) -> Any:
        """The bundle of an epoch: of the slots that open, the one that carries most."""
        folder, opened, refused = self.folder / f"{epoch:08d}", [], []
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            where = f"keys/{epoch:08d}/{path.name}"
            slot = decode("Slot", read_small(path, MAX_SLOT, where), where)
            require((slot.repository_id, slot.epoch, slot.name) == (self.repository_id, epoch, path.name)
                    and len(slot.stanza_id) == 16 and self.stanza_id in (b"", slot.stanza_id),
                    f"{where}: the slot belongs elsewhere")
            self.stanza_id = slot.stanza_id
            try:
                bundle = decode("KeyBundle", self._open_slot(slot, where), where)
            except (Failure, Unsupported) as error:
                refused.append(error)
                continue
            require(bundle.epoch == epoch and all(v == epoch or len(v) == 32 for _, v in bundle.ListFields()),
                    f"{where}: the bundle is of another epoch, or a key is not 32 bytes")
            opened.append(bundle)
        if not opened:
            only_unknown = refused and all(isinstance(error, Unsupported) for error in refused)
            raise (Unsupported if only_unknown else Failure)(
                f"no slot of key epoch {epoch} opens: {'; '.join(map(str, refused)) or 'there is none'}")
        return max(opened, key=lambda bundle: len(bundle.ListFields()))

    def _open_slot(self, slot: Any, where: str) -> bytes:
        """The encoded bundle of a slot; Failure if what was given does not open it."""
        if slot.kind == 1:
            allowed(not self.given, f"{slot.name} is not encrypted, but a key was given")
            return bytes(slot.sealed_bundle)
        supported(slot.kind in (2, 3), f"{slot.name} is a slot of kind {slot.kind}")
        kek = self.passphrase if slot.kind == 2 else self.key
        if kek is None:
            raise Failure(f"{slot.name} wants a {'passphrase' if slot.kind == 2 else 'key'}")
        require(len(slot.salt) == 32, f"{where}: the salt is not 32 bytes")
        if slot.kind == 2:
            memory, passes, lanes = slot.argon2.memory_kib, slot.argon2.passes, slot.argon2.lanes
            require(1 <= passes <= MAX_ARGON2_PASSES and 1 <= lanes <= MAX_ARGON2_LANES
                    and 8 * lanes <= memory <= MAX_ARGON2_KIB, f"{where}: Argon2 parameters outside the limits")
            kek = Argon2id(salt=slot.salt, length=32, iterations=passes, lanes=lanes, memory_cost=memory).derive(kek)
        info = b"fairvault/1 slot" + slot.repository_id + slot.stanza_id + struct.pack("<IB", slot.epoch, slot.kind)
        sealed = slot.sealed_bundle
        slot.ClearField("sealed_bundle")
        try:
            return unseal(hkdf(kek, slot.salt, info), 0, sealed, slot.SerializeToString(), where)
        except Damaged:
            raise Failure(f"{slot.name} does not open with what was given") from None

    def _derive(self, header: bytes, role: int) -> bytes:
        """The key of an object and role."""
        epoch = int.from_bytes(header[8:12], "little")
        require(epoch in self.epochs or not self.epochs, f"key epoch {epoch} is in no log entry")
        bundle = self.bundle(epoch)
        if role == METADATA:
            ikm = bundle.meta_key
        elif header[12] == 0:
            require(not bundle.data_public_key, f"data of key epoch {epoch} is not sealed to its public key")
            ikm = bundle.data_key
        else:
            allowed(bundle.data_private_key, f"the slot of key epoch {epoch} writes only: it carries no private key")
            ikm = hpke.export(bundle.data_private_key, header[48:80], b"fairvault/1 object" + header[16:48],
                              b"fairvault/1 ikm", f"data of key epoch {epoch}")
        allowed(ikm, f"the slot carries no {'metadata' if role == METADATA else 'data'} key")
        return hkdf(ikm, header[16:48], b"fairvault/1" + self.repository_id + self.stanza_id + bytes([header[5], role]))

    def content_id(self, epoch: int, content: bytes) -> bytes:
        """The id of a chunk or of a WAL file."""
        allowed(self.bundle(epoch).id_key, f"the slot of key epoch {epoch} carries no id key")
        return blake3(content, key=self.bundle(epoch).id_key).digest()

    def sections(self, stream: BinaryIO, kind: int, context: str, where: str,
                 limit: int = MAX_SECTION) -> Iterator[tuple[Header, bytes]]:
        """The header and the plaintexts of an object's sections (3): the first is metadata, what follows is data."""
        header, position = Header(stream.read(HEADER_LEN), kind, where), 0
        while raw := stream.read(SECTION_HEADER_LEN):
            here = f"{where}, section {position}"
            require(len(raw) == SECTION_HEADER_LEN, f"{here}: ends early")
            role, codec, zero, sealed_len, plain_len, ordinal = struct.unpack("<BBHIII", raw)
            is_wal = role == DATA and kind in (WAL_SEGMENT, WAL_PIECE, WAL_FILE)
            supported(codec <= 1 or codec == 3 and is_wal, f"{here}: codec {codec}")
            require(codec != 3 or plain_len <= records.MAX_RUN, f"{here}: outside the limits")
            require((role, zero, ordinal) == (METADATA if position == 0 else DATA, 0, position),
                    f"{here}: the section header does not fit its place")
            require(position < MAX_SECTIONS and plain_len <= limit and TAG_LEN <= sealed_len <= limit,
                    f"{here}: outside the limits")
            sealed = stream.read(sealed_len)
            require(len(sealed) == sealed_len, f"{here}: ends early")
            key, aad = self.object_key(header.raw, role), header.raw + raw + context.encode()
            yield header, decompress(codec, unseal(key, ordinal, sealed, aad, here), plain_len, here)
            position += 1
        require(position, f"{where}: no section")

class Stanza:
    """A stanza of a repository, its log read and verified (7)."""

    def __init__(self, repository: Path, name: str, key: Optional[bytes], passphrase: Optional[bytes]) -> None:
        allowed(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) and (repository / name).is_dir(),
                f"no stanza {name}")
        self.folder = repository / name
        self.keys = Keys(self.folder / "keys", read_repository_id(repository / "fairvault.json"), key, passphrase)
        self.fence = self.newest_epoch = 0
        self.backups: dict[str, Any] = {}  # commits that stand, in their order
        self.lives: list[int] = []  # system identifiers, newest last
        self.sessions: dict[bytes, bool] = {}  # whether the session is open
        self.distrusted: set[int] = set()  # parsers of WAL
        previous, seq = bytes(32), 1
        while (self.folder / f"log/{seq:020d}").exists():
            previous, seq = self._read_entry(seq, previous, f"log/{seq:020d}"), seq + 1
        require(seq > 1, "log: there is no entry 1")

    def _read_entry(self, seq: int, previous: bytes, where: str) -> bytes:
        """Open, verify and apply one entry; returns the hash of its stored bytes."""
        raw = read_small(self.folder / where, HEADER_LEN + SECTION_HEADER_LEN + MAX_LOG_SECTION, where)
        (header, plain), *more = self.keys.sections(io.BytesIO(raw), LOG_ENTRY, where, where, MAX_LOG_SECTION)
        require(not more, f"{where}: more than one section")
        signed = decode("SignedEntry", plain, where)
        entry = decode("LogEntry", signed.body, where)
        require(entry.seq == seq and entry.previous == previous, f"{where}: the chain is broken")
        kind = entry.WhichOneof("kind")
        supported(kind, f"{where}: an entry of a kind that this reader does not know")
        require((kind == "genesis") == (seq == 1), f"{where}: {kind} does not belong here")
        if kind == "genesis":
            self._genesis(entry.genesis, header, where)
        require(header.epoch <= self.newest_epoch, f"{where}: no entry before it names key epoch {header.epoch}")
        require(signed.role == 2 or (signed.role == 1 and kind in WRITER_MAY),
                f"{where}: {kind} signed by a role that may not say it")
        epoch = self.keys.epochs[header.epoch]
        public = epoch.writer_public_key if signed.role == 1 else epoch.operator_public_key
        try:
            Ed25519PublicKey.from_public_bytes(public).verify(signed.signature, b"fairvault/1 log entry" + signed.body)
        except (InvalidSignature, ValueError):
            raise Damaged(f"{where}: the signature is wrong") from None
        require(seq % 16 or len(entry.snapshot) == 32, f"{where}: names no snapshot")
        if entry.fence >= self.fence and header.epoch == self.newest_epoch:
            self._apply(kind, getattr(entry, kind), where)
        elif kind == "begin":  # void: this session is never open
            self.sessions.setdefault(entry.begin.session, False)
        return hashlib.sha256(raw).digest()

    def _apply(self, kind: str, body: Any, where: str) -> None:
        """Let one entry take effect."""
        if kind == "begin":
            require(body.session not in self.sessions, f"{where}: the session began before")
            self.sessions[body.session] = True
        elif kind == "abort":
            self.sessions[body.session] = False
        elif kind == "commit":
            require(body.session in self.sessions, f"{where}: the session never began")
            if self.sessions[body.session]:
                require(body.info.id not in self.backups and len(body.root) == 32,
                        f"{where}: not a commit of a new backup")
                self.sessions[body.session] = False
                self._place(body)
        elif kind == "set_fence" and body.fence > self.fence:
            self.fence = body.fence
            self.sessions.update({session: False for session in body.sessions})
        elif kind == "expired":
            self.backups.pop(body.backup, None)
        elif kind == "incarnation":
            self.lives.append(body.system_identifier)
        elif kind == "key_epoch" and body.epoch > self.newest_epoch:
            self._add_epoch(body, where)
        elif kind == "distrust_parser":
            self.distrusted.add(body.parser_version)

    def _place(self, commit: Any) -> None:
        """Add a backup behind the others; a copy where its original would be."""
        def position(info: Any) -> tuple[int, int, int]:
            known = info.system_identifier in self.lives
            life = self.lives.index(info.system_identifier) if known else len(self.lives)
            return life, info.stop_timeline, info.stop_lsn
        ids = list(self.backups)
        is_copy = commit.info.HasField("copied_from")
        later = [n for n, other in enumerate(ids)
                 if is_copy and position(self.backups[other].info) > position(commit.info)]
        behind = ids[later[0]:] if later else []
        self.backups[commit.info.id] = commit
        for other in behind:
            self.backups[other] = self.backups.pop(other)

    def _genesis(self, genesis: Any, header: Header, where: str) -> None:
        """Compare what entry 1 pins with what was found, and take its public keys."""
        self.lives.append(genesis.incarnation.system_identifier)
        require((genesis.repository_id, genesis.stanza_id) == (self.keys.repository_id, self.keys.stanza_id),
                f"{where}: pins the ids of another repository or stanza")
        require(self.keys.given or not genesis.encrypted, f"{where}: says encrypted, but an unsealed slot opened it")
        allowed(not self.keys.given or genesis.encrypted, "the stanza is not encrypted, but a key was given")
        require(genesis.key_epoch.epoch == header.epoch, f"{where}: not of the key epoch that it pins")
        self._add_epoch(genesis.key_epoch, where)

    def _add_epoch(self, epoch: Any, where: str) -> None:
        """Take the public keys of an epoch; they must be the bundle's."""
        bundle = self.keys.bundle(epoch.epoch)
        for name in ("writer_public_key", "operator_public_key", "data_public_key"):
            require(getattr(bundle, name) in (b"", getattr(epoch, name)), f"{where}: {name} is not the bundle's")
        self.keys.epochs[epoch.epoch], self.newest_epoch = epoch, epoch.epoch

def read_repository_id(path: Path) -> bytes:
    """Check fairvault.json (1)."""
    try:
        facts = json.loads(read_small(path, MAX_JSON, "fairvault.json"))
    except ValueError as error:
        raise Damaged(f"fairvault.json: {error}") from None
    require(isinstance(facts, dict) and facts.get("format") == "fairvault", "fairvault.json: not a repository")
    supported(facts.get("version") == 1 and facts.get("features") == [],
              f"fairvault.json: version {facts.get('version')}, features {facts.get('features')}")
    require(re.fullmatch(r"[0-9a-f]{32}", str(facts.get("repository"))), "fairvault.json: no repository id")
    return bytes.fromhex(facts["repository"])

def from_steps(column: list[int], steps: Any, expected: int, follows: Callable[[int, int], int]) -> list[int]:
    """Numbers that are there as they are, or as steps from what `follows` on the number before (6)."""
    require(not (column and steps), "a column is there both as it is and in steps")
    if not steps:
        return list(column)
    numbers = []
    for i, step in enumerate(steps):
        numbers.append((expected + step) % 2**32)
        expected = follows(i, numbers[-1])
    return numbers

class Frames:
    """Reads frames out of packs, with the headers that a backup's root recorded (4)."""

    def __init__(self, stanza: Stanza, packs: Any) -> None:
        count, names, headers = len(packs.names) // 32, packs.names, packs.headers
        require((len(names), len(headers)) == (count * 32, count * HEADER_LEN), "root: the pack table is not even")
        self.stanza, self.names = stanza, [names[i * 32:i * 32 + 32] for i in range(count)]
        self.headers = {name: Header(headers[i * HEADER_LEN:(i + 1) * HEADER_LEN], PACK, f"root, pack {name.hex()}")
                        for i, name in enumerate(self.names)}
        self._pack = lru_cache(16)(lambda name: open_named(
            stanza.folder / "packs" / name.hex()[:2] / name.hex(), f"pack {name.hex()}"))
        self._chunk = lru_cache(64)(self._read_chunk)
        self._last: Any = None

    def read(self, table: Any, i: int, names: Any, limit: int, where: str) -> bytes:
        """The chunk in frame `i` of a frame table whose packs are `names`."""
        columns = self._columns(table)
        require(i < len(table.pack) and len(table.ids) == 32 * len(table.pack) and len(set(map(len, columns))) == 1,
                f"{where}: no frame {i}, or the frame table is not even")
        pack, ordinal, offset, stored_len, plain_len = (column[i] for column in columns)
        require(pack < len(names), f"{where}: frame {i} is in a pack that is not in the table")
        require(ordinal < MAX_FRAMES and plain_len <= limit and stored_len >= 8 + TAG_LEN and offset >= HEADER_LEN
                and offset + stored_len <= MAX_PACK, f"{where}: frame {i} is outside the limits")
        return self._chunk(names[pack], ordinal, offset, stored_len, plain_len, table.ids[32 * i:32 * i + 32])

    def _columns(self, table: Any) -> tuple[Any, ...]:
        """The columns of a frame table; those of the last one are kept."""
        if self._last is None or self._last[0] is not table:
            lengths = table.stored_len
            ordinals = from_steps(table.ordinal, table.ordinal_step, 0, lambda _, ordinal: ordinal + 1)
            require(not table.offset_step or len(table.offset_step) == len(lengths), "the frame table is not even")
            offsets = from_steps(table.offset, table.offset_step, 0, lambda i, offset: offset + lengths[i])
            self._last = table, (list(table.pack), ordinals, offsets, list(lengths), list(table.plain_len))
        return self._last[1]

    def _read_chunk(self, name: bytes, ordinal: int, offset: int, stored_len: int, plain_len: int, id_: bytes) -> bytes:
        where = f"pack {name.hex()}, frame {ordinal}"
        require(name in self.headers, f"{where}: the root has no header of this pack")
        header, stream = self.headers[name], self._pack(name)
        stream.seek(offset)
        sealed, key = stream.read(stored_len), self.stanza.keys.object_key(header.raw, DATA)
        require(len(sealed) == stored_len, f"{where}: ends early")
        plain = unseal(key, ordinal, sealed, header.raw + struct.pack("<I", ordinal), where)
        codec, flags, parameter, length = struct.unpack_from("<BBHI", plain)
        supported(codec <= 2 and not flags, f"{where}: codec {codec}, flags {flags:#x}")
        require((parameter, length) == (0, plain_len), f"{where}: the frame header does not match the manifest")
        chunk = decompress(codec, plain[8:], plain_len, where)
        require(self.stanza.keys.content_id(header.epoch, chunk) == id_, f"{where}: the chunk's id is wrong")
        return chunk

class Restore:
    """Writes a backup's files below a target (6)."""

    def __init__(self, stanza: Stanza, commit: Any, target: Path) -> None:
        where = f"roots/{commit.root.hex()}"
        with open_named(stanza.folder / where, where) as stream:
            require(hashlib.file_digest(stream, "sha256").digest() == commit.root,  # type: ignore[arg-type]
                    f"{where}: not what its name says")
            stream.seek(0)
            plains = [plain for _, plain in stanza.keys.sections(stream, ROOT, "", where)]
        require(len(plains) == 2, f"{where}: not two sections")
        self.root = decode("Root", plains[1], where)
        require(self.root.info.id == commit.info.id, f"{where}: is of another backup")
        self.frames = Frames(stanza, self.root.packs)
        self.target = os.fsencode(target)
        self.directories: list[tuple[bytes, Any]] = []
        self.symlinks: list[tuple[bytes, Any]] = []
        self.next_frame = 0  # that an extent is expected in

    def run(self) -> None:
        """Write everything; symbolic links after all files, so that nothing is written through one."""
        os.makedirs(self.target, mode=0o700, exist_ok=True)
        allowed(not os.listdir(self.target), f"{os.fsdecode(self.target)} is not empty")
        last = b""
        for number in range(len(self.root.segments)):
            segment, self.next_frame = self._segment(number), 0
            for entry in segment.files:
                path: bytes = entry.path_bytes or entry.path.encode()
                require(len(path) <= MAX_PATH and not (entry.path and entry.path_bytes) and b"\0" not in path
                        and not {b"", b".", b".."} & set(path.split(b"/")), f"the path {path!r} is not allowed")
                require(path > last, f"{path!r} is out of order")
                self._entry(os.path.join(self.target, path), entry, segment)
                last = path
        for space in self.root.info.tablespaces:
            os.makedirs(os.path.join(self.target, b"pg_tblspc", b"%d" % space.oid), mode=0o700, exist_ok=True)
        for full, entry in self.symlinks:
            require(entry.link_target and "\0" not in entry.link_target and not os.path.lexists(full),
                    f"{full!r}: a symbolic link that cannot be")
            os.symlink(os.fsencode(entry.link_target), full)
        for full, entry in reversed(self.directories):
            self._finish(full, entry)

    def _segment(self, number: int) -> Any:
        """Put a manifest segment together from its frames."""
        where, frames, ref = f"manifest segment {number}", self.root.frames, self.root.segments[number]
        raw = bytearray()
        for i in range(ref.frame_from, ref.frame_from + ref.frame_count):
            raw += self.frames.read(frames, i, self.frames.names, MAX_SEGMENT_CHUNK, where)
            require(len(raw) <= MAX_MANIFEST_SEGMENT, f"{where}: outside the limits")
        segment = decode("ManifestSegment", bytes(raw), where)
        require(len(segment.files) == ref.files, f"{where}: holds other files than the root says")
        return segment

    def _entry(self, full: bytes, entry: Any, segment: Any) -> None:
        """Write one entry of the manifest."""
        try:
            os.makedirs(os.path.dirname(full), mode=0o700, exist_ok=True)
            if entry.kind == 0:
                self._regular(full, entry, segment)
                self._finish(full, entry)
            elif entry.kind == 1:
                os.makedirs(full, mode=0o700, exist_ok=True)
                self.directories.append((full, entry))
            else:
                supported(entry.kind == 2, f"{full!r}: file kind {entry.kind}")
                self.symlinks.append((full, entry))
        except (FileExistsError, NotADirectoryError) as error:
            raise Damaged(f"the manifest is at odds with itself: {error}") from None

    @staticmethod
    def _finish(full: bytes, entry: Any) -> None:
        os.chmod(full, entry.mode & 0o7777)
        os.utime(full, ns=(entry.mtime_us * 1000, entry.mtime_us * 1000))

    def _extents(self, extents: Any) -> tuple[Any, ...]:
        """The columns of a file's extents; files come in the order of their segment."""
        starts = list(extents.file_offset) or [0, *accumulate(extents.len)][:-1]
        frames = from_steps(extents.frame, extents.frame_step, self.next_frame, lambda _, frame: frame + 1)
        self.next_frame = frames[-1] + 1 if frames else self.next_frame
        return starts, extents.len, frames, extents.frame_offset

    def _regular(self, full: bytes, entry: Any, segment: Any) -> None:
        """Write a file: what its extents say, and zeros between them."""
        columns = self._extents(entry.extents)
        require(len(set(map(len, columns))) == 1, f"{full!r}: the extents are not even")
        position = crc = 0
        with open(full, "xb") as out:
            for start, length, frame, inside in zip(*columns):
                require(position <= start and start + length <= entry.size, f"{full!r}: an extent does not fit")
                chunk = self.frames.read(segment.frames, frame, segment.pack_names, MAX_CHUNK, repr(full))
                require(inside + length <= len(chunk), f"{full!r}: an extent reaches over the end of its chunk")
                part = chunk[inside:inside + length]
                crc = google_crc32c.extend(zeros_crc(crc, start - position), part)
                out.seek(start)
                out.write(part)
                position = start + length
            out.truncate(entry.size)
        # Of a file that several backups have made, the CRC is not known (6).
        is_right = entry.composed or zeros_crc(crc, entry.size - position) == entry.crc32c
        require(is_right, f"{full!r}: CRC-32C is wrong")

def zeros_crc(crc: int, length: int) -> int:
    """A CRC-32C continued over zeros."""
    for start in range(0, length, MIB):
        crc = google_crc32c.extend(crc, bytes(min(MIB, length - start)))
    return crc

class Wal:
    """Reads archived files of one incarnation and timeline (8)."""

    def __init__(self, stanza: Stanza, incarnation: str, name: str) -> None:
        self.stanza, self.keys, self.incarnation, self.name = stanza, stanza.keys, incarnation, name
        self.folder = f"wal/{incarnation}/{name[:8]}"
        self.is_segment = re.fullmatch(r"[0-9A-F]{24}", name) is not None

    def content(self) -> Optional[bytes]:
        """The file's content, or None if it is not here."""
        kind = WAL_SEGMENT if self.is_segment else WAL_FILE
        stored, pieces = self._newest(self.folder, self.name), None
        if stored is None and self.is_segment:
            pieces = self._pieces()
            stored = None if pieces else self._newest(self.folder, self.name)  # it may have come meanwhile
        if stored and self._is_seal(stored):
            return self._pieces(stored)
        return self._object(stored, kind)[1] if stored else pieces

    def block_map(self) -> Optional[list[str]]:
        """The block map in the header of a segment, or of the seal of its pieces, in lines; None if it is not here."""
        allowed(self.is_segment, f"{self.name} is not the name of a segment")
        stored = self._newest(self.folder, self.name)
        if stored is None:
            return None
        is_seal = self._is_seal(stored)
        with open_named(self.stanza.folder / stored, stored) as stream:
            _, plain = next(self.keys.sections(stream, PIECE_SEAL if is_seal else WAL_SEGMENT, stored, stored))
        wal = decode("PieceSeal", plain, stored).header if is_seal else decode("WalHeader", plain, stored)
        self._check_place(wal, stored)
        return map_lines(wal.summary, self.stanza.distrusted, stored)

    def _is_seal(self, context: str) -> bool:
        """Whether the object under a segment's name is a seal of pieces."""
        with open_named(self.stanza.folder / context, context) as stream:
            return self.is_segment and stream.read(6)[5:] == bytes([PIECE_SEAL])

    def _newest(self, folder: str, stem: str) -> Optional[str]:
        """The object `<stem>.<epoch>` of the highest archive epoch in a folder."""
        path, form = self.stanza.folder / folder, re.escape(stem) + r"\.[0-9]{4,}"
        found = [f.name for f in path.iterdir() if re.fullmatch(form, f.name)] if path.is_dir() else []
        newest = max(found, key=lambda name: int(name.rpartition(".")[2]), default=None)
        return newest and f"{folder}/{newest}"

    def _check_place(self, wal: Any, where: str) -> None:
        """Compare a WAL header with the place where it was found."""
        name = re.sub(r"\.partial-[0-9a-f]{8}$", ".partial", self.name)
        require((wal.name, wal.system_identifier, wal.timeline) == (name, int(self.incarnation, 16), int(name[:8], 16)),
                f"{where}: is of another place ({wal.name})")

    def _check(self, wal: Any, epoch: int, content: bytes, where: str) -> None:
        """The same, and compare it with the content."""
        self._check_place(wal, where)
        require(len(content) == wal.content_len, f"{where}: the content is not as long as its header says")
        require(self.keys.content_id(epoch, content) == wal.content_id, f"{where}: the content's id is wrong")

    def _object(self, context: str, kind: int) -> tuple[Any, bytes]:
        """Header and content of a WAL object, verified."""
        with open_named(self.stanza.folder / context, context) as stream:
            sections = self.keys.sections(stream, kind, context, context)
            header, plain = next(sections)
            wal, content = decode("WalHeader", plain, context), bytearray()
            while len(content) <= wal.content_len and (section := next(sections, None)):
                content += section[1]
        self._check(wal, header.epoch, bytes(content), context)
        return wal, bytes(content)

    def _pieces(self, context: Optional[str] = None) -> Optional[bytes]:
        """A segment assembled from pieces, those that a seal names or all that there are; None if there are none."""
        folder, form, seal, header = f"{self.folder}/{self.name}.d", r"([0-9A-F]{16})-([0-9A-F]{16})\.[0-9]{4,}", None, None
        path = self.stanza.folder / folder
        names = sorted(f.name for f in path.iterdir() if re.fullmatch(form, f.name)) if path.is_dir() else []
        if context:
            with open_named(self.stanza.folder / context, context) as stream:
                (header, plain), *more = self.keys.sections(stream, PIECE_SEAL, context, context)
            seal = decode("PieceSeal", plain, context)
            names = list(seal.pieces)
            require(names and not more, f"{context}: not a seal")
        content, size = bytearray(), 0
        for name in names:
            context, match = f"{folder}/{name}", re.fullmatch(form, name)
            require(match, f"{context}: not the name of a piece")
            wal, part = self._object(context, WAL_PIECE)
            start, end, size = int(match[1], 16), int(match[2], 16), wal.segment_size  # type: ignore[index]
            require(MIB <= size <= GIB and not size & (size - 1), f"{context}: a segment size of {size}")
            at = start - (int(self.name[8:16], 16) << 32) - int(self.name[16:], 16) * size
            require((wal.start_lsn, wal.end_lsn, len(part)) == (start, end, end - start) and 0 <= at
                    and at + len(part) <= size, f"{context}: the piece is not what its name says")
            allowed(at <= len(content), f"{folder}: bytes before {lsn(start)} are in no piece")
            shared = content[at:at + len(part)]
            require(part.startswith(shared), f"{context}: overlaps another piece and differs")
            content += part[len(shared):]
        content += bytes(size - len(content))
        if seal is not None and header is not None:
            self._check(seal.header, header.epoch, bytes(content), f"{context}, as sealed")
        return bytes(content) if names else None

def map_lines(summary: Any, distrusted: set[int], where: str) -> list[str]:
    """A segment's block map (11), checked; a relation is tablespace/database/relation."""
    allowed(summary.HasField("map"), f"{where}: holds no block map")
    found, changes, last = summary.map, summary.map.changes, (-1, -1, -1)
    allowed(found.parser_version in MAP_PARSERS and found.parser_version not in distrusted,
            f"{where}: its block map is of parser {found.parser_version}, and counts as absent")
    lines = [f"parser {found.parser_version}, server {found.server_major}"]
    if summary.first_record:
        lines.append(f"records from {lsn(summary.first_record)} to {lsn(found.last_record)}, "
                     f"behind {lsn(found.first_previous)}")
    if changes.unknown:
        lines.append(f"everything: {changes.unknown}")
    for change in changes.relations:
        relation, blocks = (change.tablespace, change.database, change.relation), list(accumulate(change.blocks))
        require(relation > last, f"{where}: relation {relation} is out of order")
        require(0 not in change.blocks[1:] and max(blocks, default=0) <= MAX_BLOCK,
                f"{where}: the blocks of relation {relation} do not ascend, or are too many")
        cut = f" from {change.limit}" if change.is_cut else ""
        named = " blocks " + " ".join(map(str, blocks)) if blocks else ""
        lines.append(f"relation {'/'.join(map(str, relation))}{cut}{named}")
        last = relation
    lines += [f"database {change.tablespace}/{change.database}" for change in changes.databases]
    if found.drops_unfinished:
        lines.append("the record before goes on nowhere")
    if found.head:
        lines.append(f"head {found.head.hex()}")
    if summary.unfinished:
        lines.append(f"tail {found.tail.hex()}, of the record at {lsn(summary.next_record)}")
    return lines

def read_wal(stanza: Stanza, name: str, read: Callable[[Wal], Any] = Wal.content) -> Any:
    """The content of an archived WAL file, or what else `read` says of it, of whichever incarnation has it."""
    allowed(re.fullmatch(r"[0-9A-F]{24}(\.partial(-[0-9a-f]{8})?|\.[0-9A-F]{8}\.backup)?|[0-9A-F]{8}\.history", name),
            f"{name!r} is not the name of a WAL file")
    incarnations = [p.name for p in stanza.folder.glob("wal/*") if re.fullmatch(r"[0-9A-Fa-f]{16}", p.name)]
    contents = [read(Wal(stanza, incarnation, name)) for incarnation in incarnations]
    found = [content for content in contents if content is not None]
    allowed(len(found) == 1, f"{name}: {'in more than one incarnation' if found else 'not in the archive'}")
    return found[0]

def lsn(value: int) -> str:
    """An LSN as PostgreSQL writes it."""
    return f"{value >> 32:X}/{value & 0xFFFFFFFF:X}"

def run(arguments: argparse.Namespace) -> None:
    """Do what the command line says."""
    key = passphrase = None
    if arguments.key_file:
        match = re.fullmatch(rb"fairvault-key-1:([0-9A-Fa-f]{64})\n?", Path(arguments.key_file).read_bytes())
        allowed(match, f"{arguments.key_file}: not a fairvault key")
        key = bytes.fromhex(match[1].decode())  # type: ignore[index]
    elif arguments.passphrase_file:
        passphrase = Path(arguments.passphrase_file).read_bytes().removesuffix(b"\n")
    stanza = Stanza(Path(arguments.repository), arguments.stanza, key, passphrase)
    if arguments.command == "list":
        rows = [{"id": i.id, "type": i.type, "start_lsn": lsn(i.start_lsn), "stop_lsn": lsn(i.stop_lsn),
                 "files": i.files, "bytes": i.plain_bytes} for i in (c.info for c in stanza.backups.values())]
        lines = [" ".join(map(str, row.values())) + "\n" for row in rows]
        sys.stdout.write(json.dumps(rows, indent=2) + "\n" if arguments.json else "".join(lines))
    elif arguments.command == "restore":
        wanted = next(reversed(stanza.backups), "latest") if arguments.backup == "latest" else arguments.backup
        allowed(wanted in stanza.backups, f"no backup {wanted}")
        Restore(stanza, stanza.backups[wanted], Path(arguments.target_dir)).run()
    elif arguments.command == "map":
        sys.stdout.write("".join(line + "\n" for line in read_wal(stanza, arguments.file_name, Wal.block_map)))
    else:
        Path(arguments.output).write_bytes(read_wal(stanza, arguments.file_name))

def main() -> NoReturn:
    """The command line."""
    parser = argparse.ArgumentParser(description="Independent reader of fairvault repositories, format version 1.")
    parser.add_argument("repository", metavar="REPO_DIR")
    commands = parser.add_subparsers(dest="command", required=True)
    for command, arguments in (("list", ()), ("restore", ("backup", "target_dir")), ("wal", ("file_name", "output")),
                               ("map", ("file_name",))):
        sub = commands.add_parser(command)
        for argument in ("stanza", *arguments):
            sub.add_argument(argument, metavar="BACKUP_ID|latest" if argument == "backup" else argument.upper())
        secret = sub.add_mutually_exclusive_group()
        secret.add_argument("--key-file", metavar="FILE")
        secret.add_argument("--passphrase-file", metavar="FILE")
    commands.choices["list"].add_argument("--json", action="store_true")
    try:
        run(parser.parse_args())
    except (Unsupported, Damaged, Failure, OSError) as error:
        kind, code = {Unsupported: ("unsupported", 3), Damaged: ("damaged", 4)}.get(type(error), ("error", 1))
        print(f"{kind}: {error}", file=sys.stderr)
        sys.exit(code)
    sys.exit(0)

if __name__ == "__main__":
    main()

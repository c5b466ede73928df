//! Keys: the secrets of an epoch, the key of each object, and the slots that wrap an epoch's secrets
//! (SPEC.md, sections 2 and 9).
//!
//! Secrets are wiped when dropped. No secret is ever part of an error or a `Debug` output.

use aes_gcm::aead::{AeadInOut, KeyInit};
use aes_gcm::{Aes256Gcm, Nonce};
use prost::Message;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use crate::error::{FormatError, Result, check_limit};
use crate::header::{KeyMode, Kind, ObjectHeader};
use crate::public::{self, Fresh};
use crate::{limits, proto};

/// Length of an AES-GCM tag, bytes.
pub const TAG_LEN: usize = 16;

/// The ids that bind every key to one stanza of one repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scope {
    /// Repository id.
    pub repository: [u8; 16],
    /// Stanza id.
    pub stanza: [u8; 16],
}

/// Whether a sealed part is content or metadata: they have different keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum KeyRole {
    /// File content, manifests, WAL content.
    Data = 0,
    /// Log, index, usage lists, WAL headers.
    Meta = 1,
}

/// The secrets of one key epoch, as far as its holder has them.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct EpochKeys {
    /// Epoch number, from 1.
    #[zeroize(skip)]
    pub epoch: u32,
    /// Seals content in symmetric mode.
    pub data_key: Option<[u8; 32]>,
    /// Opens content that was sealed to the epoch's public key.
    pub data_private_key: Option<[u8; 32]>,
    /// Keys the ids of chunks.
    pub id_key: [u8; 32],
    /// Seals log, index, usage lists and WAL headers.
    pub meta_key: [u8; 32],
    /// Signs what a writer may say.
    pub writer_seed: Option<[u8; 32]>,
    /// Signs what an operator may say.
    pub operator_seed: Option<[u8; 32]>,
    /// Public halves, as a bundle named them; for a holder without the seeds.
    #[zeroize(skip)]
    pub public_keys: PublicKeys,
}

/// The public keys of an epoch: who may sign, and what content is sealed to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PublicKeys {
    /// Content is sealed to it; in symmetric mode there is none.
    pub data: Option<[u8; 32]>,
    /// Of the writer.
    pub writer: Option<[u8; 32]>,
    /// Of the operator.
    pub operator: Option<[u8; 32]>,
}

/// As a message, too, an epoch's secrets are wiped.
impl Drop for proto::KeyBundle {
    fn drop(&mut self) {
        for secret in [
            &mut self.data_key,
            &mut self.data_private_key,
            &mut self.id_key,
            &mut self.meta_key,
            &mut self.writer_seed,
            &mut self.operator_seed,
        ] {
            secret.zeroize();
        }
    }
}

impl ZeroizeOnDrop for proto::KeyBundle {}

fn public_half(seed: &[u8; 32]) -> [u8; 32] {
    ed25519_dalek::SigningKey::from_bytes(seed).verifying_key().to_bytes()
}

impl std::fmt::Debug for EpochKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "EpochKeys {{ epoch: {}, .. }}", self.epoch)
    }
}

impl EpochKeys {
    /// The public keys: computed from the secrets, or as the bundle named them.
    pub fn public_keys(&self) -> PublicKeys {
        PublicKeys {
            data: self
                .data_private_key
                .as_ref()
                .map(public::public_half)
                .or(self.public_keys.data),
            writer: self.writer_seed.as_ref().map(public_half).or(self.public_keys.writer),
            operator: self
                .operator_seed
                .as_ref()
                .map(public_half)
                .or(self.public_keys.operator),
        }
    }

    /// Whether content is sealed to a public key.
    pub fn has_public_key(&self) -> bool {
        self.public_keys.data.is_some() || self.data_private_key.is_some()
    }

    /// Whether content of this epoch can be read with them.
    pub fn can_read(&self) -> bool {
        match self.has_public_key() {
            true => self.data_private_key.is_some(),
            false => self.data_key.is_some(),
        }
    }

    /// What a host gets that writes and never reads: no key that opens content, and not the operator's.
    pub fn write_only(&self) -> Self {
        Self {
            epoch: self.epoch,
            data_key: None,
            data_private_key: None,
            id_key: self.id_key,
            meta_key: self.meta_key,
            writer_seed: self.writer_seed,
            operator_seed: None,
            public_keys: self.public_keys(),
        }
    }

    /// What a host gets that says what an operator says, and never reads: no key that opens content.
    pub fn without_content(&self) -> Self {
        Self {
            operator_seed: self.operator_seed,
            ..self.write_only()
        }
    }

    /// The bundle as a message, with the public halves.
    pub fn to_bundle(&self) -> proto::KeyBundle {
        let public = self.public_keys();
        let list = |key: &Option<[u8; 32]>| key.map(|k| k.to_vec()).unwrap_or_default();
        proto::KeyBundle {
            epoch: self.epoch,
            data_key: list(&self.data_key),
            data_public_key: list(&public.data),
            data_private_key: list(&self.data_private_key),
            id_key: self.id_key.to_vec(),
            meta_key: self.meta_key.to_vec(),
            writer_seed: list(&self.writer_seed),
            operator_seed: list(&self.operator_seed),
            writer_public_key: list(&public.writer),
            operator_public_key: list(&public.operator),
        }
    }

    /// Encoded bundle, for a slot or a protected cache file.
    pub fn encode(&self) -> Zeroizing<Vec<u8>> {
        Zeroizing::new(self.to_bundle().encode_to_vec())
    }

    /// Reads an encoded bundle.
    pub fn decode(bytes: &[u8], what: &str) -> Result<Self> {
        let bundle = proto::KeyBundle::decode(bytes)
            .map_err(|e| FormatError::damaged(what, format!("it holds no key bundle: {e}")))?;
        Self::from_bundle(&bundle, what)
    }

    fn from_bundle(bundle: &proto::KeyBundle, what: &str) -> Result<Self> {
        let optional = |bytes: &[u8], name: &str| -> Result<Option<[u8; 32]>> {
            match bytes.len() {
                0 => Ok(None),
                32 => Ok(bytes.try_into().ok()),
                n => Err(FormatError::damaged(
                    what,
                    format!("{name} has {n} bytes instead of 32"),
                )),
            }
        };
        let required = |bytes: &[u8], name: &str| -> Result<[u8; 32]> {
            optional(bytes, name)?.ok_or_else(|| FormatError::damaged(what, format!("{name} is missing")))
        };
        let public_keys = PublicKeys {
            data: optional(&bundle.data_public_key, "public data key")?,
            writer: optional(&bundle.writer_public_key, "writer's public key")?,
            operator: optional(&bundle.operator_public_key, "operator's public key")?,
        };
        let keys = Self {
            epoch: bundle.epoch,
            data_key: optional(&bundle.data_key, "data key")?,
            data_private_key: optional(&bundle.data_private_key, "private data key")?,
            id_key: required(&bundle.id_key, "id key")?,
            meta_key: required(&bundle.meta_key, "metadata key")?,
            writer_seed: optional(&bundle.writer_seed, "writer seed")?,
            operator_seed: optional(&bundle.operator_seed, "operator seed")?,
            public_keys,
        };
        let computed = keys.public_keys();
        let agree = |named: Option<[u8; 32]>, computed: Option<[u8; 32]>| named.is_none() || named == computed;
        if !agree(public_keys.writer, computed.writer)
            || !agree(public_keys.operator, computed.operator)
            || !agree(public_keys.data, computed.data)
        {
            return Err(FormatError::damaged(
                what,
                "its public keys are not those of its secrets",
            ));
        }
        if computed.data.is_some() && keys.data_key.is_some() {
            return Err(FormatError::damaged(what, "it has data keys of both modes"));
        }
        Ok(keys)
    }

    /// The id of a chunk: keyed BLAKE3 of its plaintext.
    pub fn chunk_id(&self, plaintext: &[u8]) -> [u8; 32] {
        blake3::keyed_hash(&self.id_key, plaintext).into()
    }

    /// The key of one object for one role.
    pub fn object_key(&self, scope: &Scope, header: &ObjectHeader, role: KeyRole) -> Result<ObjectKey> {
        if header.epoch != self.epoch {
            return Err(FormatError::MissingSecret {
                what: format!("an object of key epoch {}", header.epoch),
                secret: "the keys of that epoch",
            });
        }
        let content = || format!("content of key epoch {}", self.epoch);
        let ikm = match (role, header.key_mode) {
            (KeyRole::Meta, _) => Zeroizing::new(self.meta_key),
            // Where there is a public key, nothing is sealed with a symmetric one.
            (KeyRole::Data, KeyMode::Symmetric) if self.has_public_key() => {
                return Err(FormatError::damaged(
                    content(),
                    "an object is not sealed to its public key",
                ));
            }
            (KeyRole::Data, KeyMode::Symmetric) => Zeroizing::new(
                self.data_key
                    .ok_or_else(|| FormatError::WriteOnly { what: content() })?,
            ),
            (KeyRole::Data, KeyMode::PublicKey(_)) if !self.has_public_key() => {
                return Err(FormatError::damaged(
                    content(),
                    "an object is sealed to a public key, and the epoch has none",
                ));
            }
            (KeyRole::Data, KeyMode::PublicKey(encapsulated)) => {
                let private = self.data_private_key.as_ref();
                let private = private.ok_or_else(|| FormatError::WriteOnly { what: content() })?;
                public::decapsulate(
                    private,
                    &encapsulated,
                    &data_info(&header.salt),
                    DATA_EXPORT,
                    &content(),
                )?
            }
        };
        Ok(self.role_key(scope, header, role, &ikm))
    }

    /// The header of a new object with content, and the key that its content is sealed with: to the epoch's public key,
    /// where there is one.
    pub fn seal_data(&self, scope: &Scope, kind: Kind, fresh: impl Into<Fresh>) -> Result<(ObjectHeader, ObjectKey)> {
        let mut fresh = fresh.into();
        let header = ObjectHeader::new(kind, self.epoch, fresh.salt);
        let named = self.public_keys.data;
        let Some(public) = named.or_else(|| self.data_private_key.as_ref().map(public::public_half)) else {
            return Ok((header, self.object_key(scope, &header, KeyRole::Data)?));
        };
        let ephemeral = fresh.take_ephemeral("an object for a public key")?;
        let (encapsulated, ikm) = public::encapsulate(&public, ephemeral, &data_info(&fresh.salt), DATA_EXPORT)?;
        let header = ObjectHeader {
            key_mode: KeyMode::PublicKey(encapsulated),
            ..header
        };
        let key = self.role_key(scope, &header, KeyRole::Data, &ikm);
        Ok((header, key))
    }

    fn role_key(&self, scope: &Scope, header: &ObjectHeader, role: KeyRole, ikm: &[u8; 32]) -> ObjectKey {
        let mut info = [0u8; 11 + 16 + 16 + 2];
        info[..11].copy_from_slice(b"fairvault/1");
        info[11..27].copy_from_slice(&scope.repository);
        info[27..43].copy_from_slice(&scope.stanza);
        info[43] = header.kind as u8;
        info[44] = role as u8;
        ObjectKey {
            cipher: Aes256Gcm::new(&derive(ikm, &header.salt, &info).into()),
        }
    }
}

/// HPKE's exporter context of an object's data key.
const DATA_EXPORT: &[u8] = b"fairvault/1 ikm";

/// HPKE's info of an object's data key.
fn data_info(salt: &[u8; 32]) -> Vec<u8> {
    [b"fairvault/1 object", &salt[..]].concat()
}

fn derive(ikm: &[u8; 32], salt: &[u8; 32], info: &[u8]) -> [u8; 32] {
    let mut out = [0u8; 32];
    hkdf::Hkdf::<sha2::Sha256>::new(Some(salt), ikm)
        .expand(info, &mut out)
        .expect("32 bytes are within HKDF-SHA-256's output limit");
    out
}

/// The AEAD key of one object; nonces are ordinals, each used once.
pub struct ObjectKey {
    cipher: Aes256Gcm,
}

fn nonce(ordinal: u64) -> [u8; 12] {
    let mut bytes = [0u8; 12];
    bytes[4..].copy_from_slice(&ordinal.to_be_bytes());
    bytes
}

impl ObjectKey {
    /// Encrypts `buffer[from..]` in place and appends the tag.
    pub fn seal(&self, ordinal: u64, aad: &[u8], buffer: &mut Vec<u8>, from: usize) {
        let tag = self
            .cipher
            .encrypt_inout_detached(&Nonce::from(nonce(ordinal)), aad, (&mut buffer[from..]).into())
            .expect("AES-GCM accepts up to 64 GiB and buffers are bounded far below");
        buffer.extend_from_slice(&tag);
    }

    /// Decrypts `buffer` (ciphertext and tag) in place and removes the tag.
    pub fn open(&self, ordinal: u64, aad: &[u8], buffer: &mut Vec<u8>, what: &str) -> Result<()> {
        let Some(len) = buffer.len().checked_sub(TAG_LEN) else {
            return Err(FormatError::damaged(what, "it is shorter than its authentication tag"));
        };
        let mut tag = [0u8; TAG_LEN];
        tag.copy_from_slice(&buffer[len..]);
        buffer.truncate(len);
        self.cipher
            .decrypt_inout_detached(
                &Nonce::from(nonce(ordinal)),
                aad,
                buffer.as_mut_slice().into(),
                &tag.into(),
            )
            .map_err(|_| FormatError::DoesNotOpen { what: what.to_owned() })
    }
}

/// A secret that opens a slot.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub enum Secret {
    /// Stretched by Argon2id.
    Passphrase(Vec<u8>),
    /// 32 random bytes.
    Key([u8; 32]),
}

const KEY_PREFIX: &str = "fairvault-key-1:";

impl Secret {
    /// A secret from the text of a file, a variable or a command: a `fairvault-key-1:` line is a key, all
    /// other text is a passphrase. One trailing line end is not part of it.
    pub fn from_text(text: &[u8]) -> Result<Self> {
        let text = text.strip_suffix(b"\n").unwrap_or(text);
        let text = text.strip_suffix(b"\r").unwrap_or(text);
        if text.is_empty() {
            return Err(FormatError::Invalid {
                what: "key",
                value: String::new(),
                expected: "it is empty",
            });
        }
        match text.strip_prefix(KEY_PREFIX.as_bytes()) {
            None => Ok(Self::Passphrase(text.to_vec())),
            Some(digits) => {
                let mut key = [0u8; 32];
                hex::decode_to_slice(digits, &mut key).map_err(|_| FormatError::Invalid {
                    what: "key",
                    value: KEY_PREFIX.to_owned() + "…",
                    expected: "64 hexadecimal digits must follow the prefix",
                })?;
                Ok(Self::Key(key))
            }
        }
    }

    /// The text form of a 32-byte key.
    pub fn key_text(key: &[u8; 32]) -> Zeroizing<String> {
        Zeroizing::new(format!("{KEY_PREFIX}{}", hex::encode(key)))
    }

    fn kind(&self) -> proto::SlotKind {
        match self {
            Self::Passphrase(_) => proto::SlotKind::SlotPassphrase,
            Self::Key(_) => proto::SlotKind::SlotKey,
        }
    }
}

/// Argon2id's default cost: 256 MiB, 3 passes, 1 lane.
pub fn default_argon2() -> proto::Argon2Params {
    proto::Argon2Params {
        memory_kib: 256 << 10,
        passes: 3,
        lanes: 1,
    }
}

fn kek(secret: &Secret, slot: &proto::Slot, salt: &[u8; 32]) -> Result<Zeroizing<[u8; 32]>> {
    match secret {
        Secret::Key(key) => Ok(Zeroizing::new(*key)),
        Secret::Passphrase(passphrase) => {
            let p = slot.argon2.unwrap_or_default();
            check_limit(
                "the slot's Argon2 memory (KiB)",
                p.memory_kib.into(),
                limits::ARGON2_MEMORY_KIB.into(),
            )?;
            check_limit(
                "the slot's Argon2 passes",
                p.passes.into(),
                limits::ARGON2_PASSES.into(),
            )?;
            check_limit("the slot's Argon2 lanes", p.lanes.into(), limits::ARGON2_LANES.into())?;
            let params = argon2::Params::new(p.memory_kib, p.passes, p.lanes, Some(32))
                .map_err(|e| FormatError::damaged("the slot's Argon2 parameters", e.to_string()))?;
            let mut out = Zeroizing::new([0u8; 32]);
            argon2::Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, params)
                .hash_password_into(passphrase, salt, out.as_mut())
                .map_err(|e| FormatError::damaged("the slot's Argon2 parameters", e.to_string()))?;
            Ok(out)
        }
    }
}

fn slot_key(kek: &[u8; 32], slot: &proto::Slot, salt: &[u8; 32]) -> ObjectKey {
    let mut info = b"fairvault/1 slot".to_vec();
    info.extend_from_slice(&slot.repository_id);
    info.extend_from_slice(&slot.stanza_id);
    info.extend_from_slice(&slot.epoch.to_le_bytes());
    info.push(slot.kind as u8);
    ObjectKey {
        cipher: Aes256Gcm::new(&derive(kek, salt, &info).into()),
    }
}

/// Wraps `keys` into a slot. Without a secret the slot is unsealed.
pub fn seal_slot(
    scope: &Scope,
    keys: &EpochKeys,
    name: &str,
    secret: Option<&Secret>,
    argon2: proto::Argon2Params,
    salt: [u8; 32],
    created_us: i64,
) -> Result<Vec<u8>> {
    let kind = secret.map_or(proto::SlotKind::SlotUnsealed, Secret::kind);
    let mut slot = proto::Slot {
        repository_id: scope.repository.to_vec(),
        stanza_id: scope.stanza.to_vec(),
        epoch: keys.epoch,
        name: name.to_owned(),
        kind: kind as i32,
        argon2: (kind == proto::SlotKind::SlotPassphrase).then_some(argon2),
        salt: salt.to_vec(),
        created_us,
        write_only: !keys.can_read(),
        ..Default::default()
    };
    let mut bundle = keys.encode().to_vec();
    if let Some(secret) = secret {
        let key = slot_key(&*kek(secret, &slot, &salt)?, &slot, &salt);
        let aad = slot.encode_to_vec();
        key.seal(0, &aad, &mut bundle, 0);
    }
    slot.sealed_bundle = bundle;
    Ok(slot.encode_to_vec())
}

/// Reads a slot without opening it.
pub fn decode_slot(bytes: &[u8], what: &str) -> Result<proto::Slot> {
    check_limit(what, bytes.len() as u64, limits::SLOT_BYTES)?;
    let slot = proto::Slot::decode(bytes).map_err(|e| FormatError::damaged(what, e.to_string()))?;
    if slot.repository_id.len() != 16 || slot.stanza_id.len() != 16 || slot.salt.len() != 32 {
        return Err(FormatError::damaged(what, "its ids or its salt have a wrong length"));
    }
    match slot.kind() {
        proto::SlotKind::SlotUnspecified => Err(FormatError::unsupported(what, format!("slot kind {}", slot.kind))),
        _ => Ok(slot),
    }
}

/// The ids in a slot.
pub fn slot_scope(slot: &proto::Slot) -> Scope {
    let take = |bytes: &[u8]| bytes.try_into().unwrap_or([0u8; 16]);
    Scope {
        repository: take(&slot.repository_id),
        stanza: take(&slot.stanza_id),
    }
}

/// Whether `secret` is of the kind that this slot takes.
pub fn slot_takes(slot: &proto::Slot, secret: &Secret) -> bool {
    slot.kind() == secret.kind()
}

/// Whether `secret` opens this slot, as far as can be told without stretching a passphrase.
pub fn open_slot_cheaply(slot: &proto::Slot, secret: &Secret) -> bool {
    slot_takes(slot, secret)
        && (matches!(secret, Secret::Passphrase(_)) || open_slot(slot, Some(secret), "slot").is_ok())
}

/// Opens a slot. An unsealed slot needs no secret.
pub fn open_slot(slot: &proto::Slot, secret: Option<&Secret>, what: &str) -> Result<EpochKeys> {
    let keys = match (slot.kind(), secret) {
        (proto::SlotKind::SlotUnsealed, _) => EpochKeys::decode(&slot.sealed_bundle, what)?,
        (proto::SlotKind::SlotPassphrase | proto::SlotKind::SlotKey, Some(secret)) => {
            let salt: [u8; 32] = slot
                .salt
                .as_slice()
                .try_into()
                .map_err(|_| FormatError::damaged(what, "its salt is not 32 bytes"))?;
            let key = slot_key(&*kek(secret, slot, &salt)?, slot, &salt);
            let mut bundle = Zeroizing::new(slot.sealed_bundle.clone());
            let aad = proto::Slot {
                sealed_bundle: Vec::new(),
                ..slot.clone()
            }
            .encode_to_vec();
            key.open(0, &aad, &mut bundle, what)?;
            EpochKeys::decode(&bundle, what)?
        }
        (proto::SlotKind::SlotPublicKey, _) => {
            return Err(FormatError::unsupported(what, "a slot sealed to a public key"));
        }
        (_, None) => {
            return Err(FormatError::MissingSecret {
                what: what.to_owned(),
                secret: "a key or a passphrase",
            });
        }
        (proto::SlotKind::SlotUnspecified, _) => return Err(FormatError::unsupported(what, "unknown slot kind")),
    };
    if keys.epoch != slot.epoch {
        return Err(FormatError::damaged(what, "its bundle is of another epoch"));
    }
    Ok(keys)
}

//! Sealing to a public key: HPKE, of which only the export is used (SPEC.md, sections 2 and 9).
//!
//! What always holds: whoever seals forgets what the encapsulated key was made of, and cannot open what was sealed; the
//! same randomness makes the same encapsulated key, so that nothing here asks the machine for any.

use hpke::aead::AesGcm256;
use hpke::kdf::HkdfSha256;
use hpke::kem::X25519HkdfSha256;
use hpke::rand_core::{TryCryptoRng, TryRng};
use hpke::{Deserializable, Kem, OpModeR, OpModeS, Serializable, setup_receiver, setup_sender_with_rng};
use zeroize::Zeroizing;

use crate::error::{FormatError, Result};

type Suite = X25519HkdfSha256;

/// What a new object is made with: fresh, random, and never used for another one.
pub struct Fresh {
    /// Its salt, which is stored.
    pub salt: [u8; 32],
    ephemeral: Option<Zeroizing<[u8; 32]>>,
}

impl Fresh {
    /// `ephemeral` is a secret that nobody keeps.
    pub fn new(salt: [u8; 32], ephemeral: [u8; 32]) -> Self {
        Self {
            salt,
            ephemeral: Some(Zeroizing::new(ephemeral)),
        }
    }

    /// What the encapsulated key of an object named `what` is made of.
    pub(crate) fn take_ephemeral(&mut self, what: &str) -> Result<Zeroizing<[u8; 32]>> {
        self.ephemeral.take().ok_or_else(|| FormatError::MissingSecret {
            what: what.to_owned(),
            secret: "randomness of its own",
        })
    }
}

impl From<[u8; 32]> for Fresh {
    /// A salt alone: enough where nothing is sealed to a public key, and refused where something is.
    fn from(salt: [u8; 32]) -> Self {
        Self { salt, ephemeral: None }
    }
}

/// Hands out the bytes that it was given, once.
struct Once(Option<Zeroizing<[u8; 32]>>);

impl TryRng for Once {
    type Error = core::convert::Infallible;

    fn try_next_u32(&mut self) -> core::result::Result<u32, Self::Error> {
        let mut bytes = [0; 4];
        self.try_fill_bytes(&mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn try_next_u64(&mut self) -> core::result::Result<u64, Self::Error> {
        let mut bytes = [0; 8];
        self.try_fill_bytes(&mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn try_fill_bytes(&mut self, to: &mut [u8]) -> core::result::Result<(), Self::Error> {
        // The key pair of DHKEM(X25519) is made of 32 bytes, and nothing else is asked for.
        let ephemeral = self.0.take().expect("HPKE asks for randomness once");
        assert_eq!(
            to.len(),
            ephemeral.len(),
            "HPKE asks for the randomness of one key pair"
        );
        to.copy_from_slice(&*ephemeral);
        Ok(())
    }
}

impl TryCryptoRng for Once {}

/// The public key of a private one, which is any 32 bytes.
pub fn public_half(private: &[u8; 32]) -> [u8; 32] {
    // Every 32 bytes are a private key.
    let private = <Suite as Kem>::PrivateKey::from_bytes(private).expect("32 bytes are an X25519 private key");
    Suite::sk_to_pk(&private).to_bytes().0
}

/// A secret for the holder of the private key: the encapsulated key, which is stored, and the secret itself.
pub fn encapsulate(
    public: &[u8; 32],
    ephemeral: Zeroizing<[u8; 32]>,
    info: &[u8],
    exporter_context: &[u8],
) -> Result<([u8; 32], Zeroizing<[u8; 32]>)> {
    let bad = || FormatError::damaged("a public key", "nothing can be sealed to it");
    let public = <Suite as Kem>::PublicKey::from_bytes(public).map_err(|_| bad())?;
    let (encapsulated, context) = setup_sender_with_rng::<AesGcm256, HkdfSha256, Suite>(
        &OpModeS::Base,
        &public,
        info,
        &mut Once(Some(ephemeral)),
    )
    .map_err(|_| bad())?;
    let mut secret = Zeroizing::new([0u8; 32]);
    context.export(exporter_context, &mut *secret).map_err(|_| bad())?;
    Ok((encapsulated.to_bytes().0, secret))
}

/// The secret in an encapsulated key; `what` names it in errors.
pub fn decapsulate(
    private: &[u8; 32],
    encapsulated: &[u8; 32],
    info: &[u8],
    exporter_context: &[u8],
    what: &str,
) -> Result<Zeroizing<[u8; 32]>> {
    let bad = || FormatError::DoesNotOpen { what: what.to_owned() };
    let private = <Suite as Kem>::PrivateKey::from_bytes(private).map_err(|_| bad())?;
    let encapsulated = <Suite as Kem>::EncappedKey::from_bytes(encapsulated).map_err(|_| bad())?;
    let context = setup_receiver::<AesGcm256, HkdfSha256, Suite>(&OpModeR::Base, &private, &encapsulated, info)
        .map_err(|_| bad())?;
    let mut secret = Zeroizing::new([0u8; 32]);
    context.export(exporter_context, &mut *secret).map_err(|_| bad())?;
    Ok(secret)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes<const N: usize>(digits: &str) -> [u8; N] {
        let mut out = [0; N];
        hex::decode_to_slice(digits, &mut out).unwrap();
        out
    }

    /// RFC 9180, appendix A.1.1: DHKEM(X25519, HKDF-SHA256), with the keys of that vector. Its AEAD is another one, which
    /// is part of what is exported, so that only keys compare.
    #[test]
    fn keys_are_those_of_the_rfc() {
        let ephemeral = bytes("7268600d403fce431561aef583ee1613527cff655c1343f29812e66706df3234");
        let private = bytes("4612c550263fc8ad58375df3f557aac531d26850903e55a9f23f21d8534e8ac8");
        let public = public_half(&private);
        assert_eq!(
            hex::encode(public),
            "3948cfe0ad1ddb695d780e59077195da6c56506b027329794ab02bca80815c4d"
        );
        let (encapsulated, secret) = encapsulate(&public, Zeroizing::new(ephemeral), b"info", b"context").unwrap();
        assert_eq!(
            hex::encode(encapsulated),
            "37fda3567bdbd628e88668c3c8d7e97d1d1253b6d4ea6d44c150f741f1bf4431"
        );
        let opened = decapsulate(&private, &encapsulated, b"info", b"context", "it").unwrap();
        assert_eq!(*opened, *secret);
        for (info, context) in [(&b"other"[..], &b"context"[..]), (b"info", b"other")] {
            let other = decapsulate(&private, &encapsulated, info, context, "it").unwrap();
            assert_ne!(*other, *secret);
        }
        assert_ne!(
            *decapsulate(&[1; 32], &encapsulated, b"info", b"context", "it").unwrap(),
            *secret
        );
    }

    #[test]
    fn a_salt_alone_seals_nothing_to_a_public_key() {
        assert!(Fresh::from([1; 32]).take_ephemeral("it").is_err());
        let mut fresh = Fresh::new([1; 32], [2; 32]);
        assert_eq!(*fresh.take_ephemeral("it").unwrap(), [2; 32]);
        assert!(fresh.take_ephemeral("it").is_err(), "once");
    }
}

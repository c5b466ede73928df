//! Signing for a store's client with a secret that the client never holds.
//!
//! The client copies its secret for every request that it signs, and wipes no copy. So it is given a stand-in, and asks
//! here for every HMAC: where the stand-in is the key, the secret takes its place. What always holds: the secret, and
//! all that is made of it on the heap, is wiped when it is dropped; with any other key, an HMAC is what it always is.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use object_store::client::{CryptoProvider, DigestAlgorithm, DigestContext, HmacContext, Signer, SigningAlgorithm};
use object_store::{Error, Result};
use ring::digest;
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

/// What the client holds in the secret's place; Base64, as an Azure account's key is.
pub const STAND_IN: &str = "aGVsZCBieSBmYWlydmF1bHQh";

/// Makes the client's hashes and HMACs.
pub struct Signing {
    /// The key that the client makes of the stand-in.
    stand_in: Vec<u8>,
    /// The one that it would make of the secret.
    key: Zeroizing<Vec<u8>>,
}

impl std::fmt::Debug for Signing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Signing")
    }
}

impl Signing {
    /// For S3: signatures begin with the secret behind four letters.
    pub fn s3(secret: &str) -> Self {
        const BEFORE: &[u8] = b"AWS4";
        // One that grows leaves parts of itself behind.
        let mut key = Zeroizing::new(Vec::with_capacity(BEFORE.len() + secret.len()));
        key.extend_from_slice(BEFORE);
        key.extend_from_slice(secret.as_bytes());
        Self {
            stand_in: [BEFORE, STAND_IN.as_bytes()].concat(),
            key,
        }
    }

    /// For Azure: secrets are Base64. None if this one is not.
    pub fn azure(secret: &str) -> Option<Self> {
        Some(Self {
            stand_in: BASE64_STANDARD.decode(STAND_IN).ok()?,
            key: Zeroizing::new(BASE64_STANDARD.decode(secret).ok()?),
        })
    }
}

impl CryptoProvider for Signing {
    fn digest(&self, algorithm: DigestAlgorithm) -> Result<Box<dyn DigestContext>> {
        must_be_sha256(&algorithm)?;
        Ok(Box::new(Hash {
            running: digest::Context::new(&digest::SHA256),
            ended: None,
        }))
    }

    fn hmac(&self, algorithm: DigestAlgorithm, secret: &[u8]) -> Result<Box<dyn HmacContext>> {
        must_be_sha256(&algorithm)?;
        Ok(Box::new(match secret == self.stand_in.as_slice() {
            true => Hmac::new(self.key.as_slice()),
            false => Hmac::new(secret),
        }))
    }

    fn sign(&self, _: SigningAlgorithm, _: &[u8]) -> Result<Box<dyn Signer>> {
        Err(unsupported("signatures of other kinds than HMAC"))
    }
}

fn must_be_sha256(algorithm: &DigestAlgorithm) -> Result<()> {
    match algorithm {
        DigestAlgorithm::Sha256 => Ok(()),
        _ => Err(unsupported("hashes other than SHA-256")),
    }
}

fn unsupported(what: &str) -> Error {
    Error::NotSupported {
        source: format!("the client asks for {what}").into(),
    }
}

/// Of what is sent; there is nothing to hide, and ring is faster than others on processors without instructions for it.
struct Hash {
    running: digest::Context,
    ended: Option<digest::Digest>,
}

impl DigestContext for Hash {
    fn update(&mut self, data: &[u8]) {
        self.running.update(data);
    }

    fn finish(&mut self) -> Result<&[u8]> {
        let digest = self.running.clone().finish();
        Ok(digest::Digest::as_ref(self.ended.insert(digest)))
    }
}

/// HMAC-SHA-256 (RFC 2104); states of the hash are wiped by their crate.
struct Hmac {
    inner: Sha256,
    outer: Sha256,
    tag: Zeroizing<[u8; 32]>,
}

impl Hmac {
    fn new(key: &[u8]) -> Self {
        let mut block = Zeroizing::new([0u8; 64]);
        if key.len() > block.len() {
            let hashed: Zeroizing<[u8; 32]> = Zeroizing::new(Sha256::digest(key).into());
            block[..32].copy_from_slice(&hashed[..]);
        } else {
            block[..key.len()].copy_from_slice(key);
        }
        block.iter_mut().for_each(|byte| *byte ^= 0x36);
        let inner = Sha256::new_with_prefix(&block[..]);
        block.iter_mut().for_each(|byte| *byte ^= 0x36 ^ 0x5c);
        let outer = Sha256::new_with_prefix(&block[..]);
        Self {
            inner,
            outer,
            tag: Zeroizing::new([0; 32]),
        }
    }
}

impl HmacContext for Hmac {
    fn update(&mut self, data: &[u8]) {
        Digest::update(&mut self.inner, data);
    }

    fn finish(&mut self) -> Result<&[u8]> {
        let hashed: Zeroizing<[u8; 32]> = Zeroizing::new(self.inner.finalize_reset().into());
        Digest::update(&mut self.outer, &hashed[..]);
        self.tag = Zeroizing::new(self.outer.finalize_reset().into());
        Ok(&self.tag[..])
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use object_store::ClientOptions;
    use object_store::aws::AmazonS3Builder;
    use object_store::azure::MicrosoftAzureBuilder;
    use object_store::client::{HttpClient, HttpConnector, HttpError, HttpRequest, HttpResponse, HttpService};
    use object_store::path::Path;
    use object_store::signer::{Method, Signer};

    use super::*;

    fn hmac(key: &[u8], data: &str) -> String {
        let signing = Signing::s3("s");
        let mut hmac = signing.hmac(DigestAlgorithm::Sha256, key).unwrap();
        let (one, other) = data.as_bytes().split_at(5);
        hmac.update(one);
        hmac.update(other);
        hex::encode(hmac.finish().unwrap())
    }

    #[test]
    fn hmacs_are_those_of_the_standard() {
        // RFC 4231, test cases 1, 2 and 6.
        let hi = hmac(&[0x0b; 20], "Hi There");
        assert_eq!(hi, "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7");
        let jefe = hmac(b"Jefe", "what do ya want for nothing?");
        assert_eq!(jefe, "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
        let long = hmac(&[0xaa; 131], "Test Using Larger Than Block-Size Key - Hash Key First");
        assert_eq!(long, "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54");
    }

    #[test]
    fn hashes_are_those_of_the_standard() {
        let mut hash = Signing::s3("s").digest(DigestAlgorithm::Sha256).unwrap();
        hash.update(b"a");
        hash.update(b"bc");
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(hex::encode(hash.finish().unwrap()), expected);
    }

    /// Nothing is sent.
    #[derive(Debug)]
    struct Nowhere;

    impl HttpConnector for Nowhere {
        fn connect(&self, _: &ClientOptions) -> Result<HttpClient> {
            Ok(HttpClient::new(Nowhere))
        }
    }

    #[async_trait::async_trait]
    impl HttpService for Nowhere {
        async fn call(&self, _: HttpRequest) -> std::result::Result<HttpResponse, HttpError> {
            unreachable!("something was sent")
        }
    }

    /// A URL, and the words of its query, which are in any order.
    async fn signed(by: &dyn Signer) -> Vec<String> {
        let path = Path::from("x");
        let url = by.signed_url(Method::GET, &path, Duration::from_secs(60));
        let url = url.await.unwrap();
        let mut words: Vec<String> = url.as_str().split(['?', '&']).map(str::to_owned).collect();
        words.sort_unstable();
        words
    }

    /// What both sign in the same second is the same.
    async fn are_alike(ours: &dyn Signer, theirs: &dyn Signer) {
        loop {
            let (before, url, after) = (signed(theirs).await, signed(ours).await, signed(theirs).await);
            if before == after {
                return assert_eq!(url, before);
            }
        }
    }

    #[tokio::test]
    async fn requests_to_s3_are_signed_with_the_secret() {
        // Shorter than a block of the hash with the letters before it, and longer.
        for secret in ["secret".to_owned(), "secret".repeat(11)] {
            let builder = AmazonS3Builder::new().with_http_connector(Nowhere);
            let builder = builder.with_bucket_name("b").with_access_key_id("k");
            let theirs = builder.clone().with_secret_access_key(&secret).build().unwrap();
            let builder = builder.with_crypto_provider(Arc::new(Signing::s3(&secret)));
            let ours = builder.with_secret_access_key(STAND_IN).build().unwrap();
            are_alike(&ours, &theirs).await;
        }
    }

    #[tokio::test]
    async fn requests_to_azure_are_signed_with_the_secret() {
        let secret = BASE64_STANDARD.encode([7; 64]);
        let builder = MicrosoftAzureBuilder::new().with_http_connector(Nowhere);
        let builder = builder.with_account("a").with_container_name("c");
        let theirs = builder.clone().with_access_key(&secret).build().unwrap();
        let builder = builder.with_crypto_provider(Arc::new(Signing::azure(&secret).unwrap()));
        let ours = builder.with_access_key(STAND_IN).build().unwrap();
        are_alike(&ours, &theirs).await;
        assert!(Signing::azure("no Base64").is_none());
    }
}

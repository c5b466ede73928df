//! TLS to the server: the verification that sslmode asks for, client certificates, and the channel binding
//! that SCRAM-SHA-256-PLUS needs.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use sha2::Digest;

use super::conninfo::{ConnInfo, SslMode};
use crate::error::{Error, Result};

/// Checks the chain only (verify-ca), or nothing but the handshake's signature (require).
#[derive(Debug)]
struct Relaxed {
    roots: Option<RootCertStore>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Relaxed {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        if let Some(roots) = &self.roots {
            let certificate = ParsedCertificate::try_from(end_entity)?;
            let algorithms = self.provider.signature_verification_algorithms.all;
            verify_server_cert_signed_by_trust_anchor(&certificate, roots, intermediates, now, algorithms)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(
            message,
            certificate,
            signed,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            certificate,
            signed,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

fn roots(file: &str) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    if file == "system" {
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    } else {
        let bad = |why: String| Error::usage(format!("sslrootcert {file}: {why}"));
        let certificates = CertificateDer::pem_file_iter(file).map_err(|e| bad(e.to_string()))?;
        for certificate in certificates {
            roots
                .add(certificate.map_err(|e| bad(e.to_string()))?)
                .map_err(|e| bad(e.to_string()))?;
        }
    }
    if roots.is_empty() {
        return Err(Error::usage(format!("sslrootcert {file} holds no certificate")));
    }
    Ok(roots)
}

/// The TLS configuration that `info` asks for.
pub fn config(info: &ConnInfo) -> Result<ClientConfig> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|e| Error::failed("TLS cannot be set up").caused_by(e))?;
    let file = info.sslrootcert.as_deref();
    let relaxed = |roots| {
        Arc::new(Relaxed {
            roots,
            provider: provider.clone(),
        })
    };
    let builder = match (info.sslmode, file) {
        (SslMode::VerifyFull, Some(file)) => builder.with_root_certificates(roots(file)?),
        (SslMode::VerifyCa, Some(file)) => builder
            .dangerous()
            .with_custom_certificate_verifier(relaxed(Some(roots(file)?))),
        (SslMode::VerifyFull | SslMode::VerifyCa, None) => {
            return Err(Error::usage("sslmode=verify-ca and verify-full need sslrootcert")
                .remedy("name the file of root certificates, or sslrootcert=system"));
        }
        // As libpq: a root certificate file turns `require` into `verify-ca`.
        (SslMode::Require, Some(file)) if std::path::Path::new(file).exists() => builder
            .dangerous()
            .with_custom_certificate_verifier(relaxed(Some(roots(file)?))),
        _ => builder.dangerous().with_custom_certificate_verifier(relaxed(None)),
    };
    match (&info.sslcert, &info.sslkey) {
        (Some(cert), Some(key)) => {
            let bad = |path: &std::path::Path, why: String| Error::usage(format!("{}: {why}", path.display()));
            let chain = CertificateDer::pem_file_iter(cert)
                .and_then(Iterator::collect::<std::result::Result<Vec<_>, _>>)
                .map_err(|e| bad(cert, e.to_string()))?;
            let private = PrivateKeyDer::from_pem_file(key).map_err(|e| bad(key, e.to_string()))?;
            builder
                .with_client_auth_cert(chain, private)
                .map_err(|e| bad(cert, e.to_string()))
        }
        (Some(_), None) => Err(Error::usage("sslcert is given without sslkey")),
        (None, _) => Ok(builder.with_no_client_auth()),
    }
}

/// The `tls-server-end-point` channel binding (RFC 5929): a hash of the server's certificate, with the hash
/// of the certificate's signature, at least SHA-256. `None` where the signature has no hash of its own.
pub fn server_end_point(certificate: &[u8]) -> Option<Vec<u8>> {
    // The signature algorithm's OID, DER-encoded, stands in the certificate as it is.
    const SHA384: [&[u8]; 2] = [&[42, 134, 72, 134, 247, 13, 1, 1, 12], &[42, 134, 72, 206, 61, 4, 3, 3]];
    const SHA512: [&[u8]; 2] = [&[42, 134, 72, 134, 247, 13, 1, 1, 13], &[42, 134, 72, 206, 61, 4, 3, 4]];
    const NO_HASH: [&[u8]; 3] = [&[43, 101, 112], &[43, 101, 113], &[42, 134, 72, 134, 247, 13, 1, 1, 10]];
    let oid = signature_algorithm(certificate)?;
    if NO_HASH.contains(&oid) {
        return None;
    }
    Some(if SHA384.contains(&oid) {
        sha2::Sha384::digest(certificate).to_vec()
    } else if SHA512.contains(&oid) {
        sha2::Sha512::digest(certificate).to_vec()
    } else {
        sha2::Sha256::digest(certificate).to_vec()
    })
}

/// The OID in Certificate ::= SEQUENCE { tbsCertificate, signatureAlgorithm SEQUENCE { OID, … }, … }.
fn signature_algorithm(certificate: &[u8]) -> Option<&[u8]> {
    let (outer, _) = der(certificate, 0x30)?;
    let (_, rest) = der(outer, 0x30)?;
    let (algorithm, _) = der(rest, 0x30)?;
    Some(der(algorithm, 0x06)?.0)
}

/// Content and rest of a DER element with this tag.
fn der(bytes: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (&found, rest) = bytes.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (len, rest) = match first {
        0..=127 => (usize::from(first), rest),
        0x81..=0x84 => {
            let (digits, rest) = rest.split_at_checked(usize::from(first & 0x7F))?;
            (digits.iter().fold(0usize, |n, &d| n << 8 | usize::from(d)), rest)
        }
        _ => return None,
    };
    (found == tag).then(|| rest.split_at_checked(len)).flatten()
}

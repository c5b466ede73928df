//! Repository URLs: `file:///path`, `s3://bucket/prefix`, `gs://…`, `az://…`, `memory://` for tests.

use std::os::unix::fs::DirBuilderExt;
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey, AwsCredential, Checksum};
use object_store::azure::{AzureAccessKey, AzureCredential, MicrosoftAzureBuilder};
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::local::LocalFileSystem;
use object_store::{BackoffConfig, Certificate, ClientOptions, ObjectStore, RetryConfig, StaticCredentialProvider};
use zeroize::Zeroizing;

use super::s3::{AddMd5, S3};
use super::signing::{STAND_IN, Signing};
use super::{Root, Store, StoreSettings};
use crate::error::{Error, Result};

/// Where a repository is and how to reach it. Secrets come from files or the environment.
#[derive(Clone, Default)]
pub struct RepositoryUrl {
    /// The URL.
    pub url: String,
    /// S3: endpoint of a store that is not AWS.
    pub endpoint: Option<String>,
    /// S3: region.
    pub region: Option<String>,
    /// S3: bucket as a host name instead of the first path component.
    pub virtual_host: bool,
    /// PEM file with the root certificates that are trusted instead of the system's.
    pub ca_file: Option<String>,
    /// S3, GCS, Azure: storage class of packs.
    pub storage_class: Option<String>,
    /// S3: server-side encryption, `AES256` or `aws:kms`.
    pub server_side_encryption: Option<String>,
    /// S3: KMS key id.
    pub kms_key: Option<String>,
    /// S3: how the store checks what arrives.
    pub checksum: Check,
    /// Access key id.
    pub access_key: Option<String>,
    /// Secret access key.
    pub secret_key: Option<Zeroizing<String>>,
    /// No conditional create; one writer is promised.
    pub single_writer: bool,
    /// Locked by the processes of this host where one writer is promised.
    pub lock_file: Option<std::path::PathBuf>,
    /// Others have the right to delete.
    pub has_deleter: bool,
    /// How long one request may stand still.
    pub request_timeout: Option<Duration>,
    /// How long the store may stay away.
    pub retry_timeout: Option<Duration>,
}

/// Without its secrets.
impl std::fmt::Debug for RepositoryUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("RepositoryUrl");
        shown.field("url", &self.url).field("endpoint", &self.endpoint);
        shown.finish_non_exhaustive()
    }
}

/// How an S3 store checks what arrives. A bucket with object lock takes nothing without.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Check {
    /// A SHA-256 checksum header; it costs nothing, since requests are signed with the same hash.
    #[default]
    Sha256,
    /// The Content-MD5 header, for stores that do not know the other.
    Md5,
    /// Nothing but the signature.
    None,
}

/// How long one upload may take: a WAL segment of 1 GiB at 5 Mbit/s.
const UPLOAD_LIMIT: Duration = Duration::from_secs(1800);

/// Classes whose objects cannot be read until they were brought back from an archive.
fn is_archival(class: &str) -> bool {
    matches!(
        class.to_ascii_uppercase().as_str(),
        "GLACIER" | "DEEP_ARCHIVE" | "ARCHIVE"
    )
}

impl RepositoryUrl {
    /// Opens the store. `create` makes the folder of a directory repository.
    pub fn open(&self, create: bool) -> Result<Store> {
        let settings = StoreSettings {
            retry_timeout: self.retry_timeout.unwrap_or(Duration::from_secs(180)),
            single_writer: self.single_writer,
            storage_class: self.storage_class.clone(),
            may_delete: !self.has_deleter,
            ordered_lists: matches!(self.url.split("://").next(), Some("s3" | "gs" | "az")),
            root: None,
            content_md5: self.checksum == Check::Md5,
            lock_file: self.lock_file.clone(),
        };
        if let Some(class) = self.storage_class.as_deref().filter(|class| is_archival(class)) {
            return Err(Error::usage(format!(
                "storage_class = {class:?}: objects of this class must be thawed for hours before they can be read"
            ))
            .remedy("use a class that is read at once, such as STANDARD_IA or GLACIER_IR"));
        }
        let (scheme, rest) = self.url.split_once("://").ok_or_else(|| self.bad("it has no scheme"))?;
        let (inner, prefix): (Arc<dyn ObjectStore>, &str) = match scheme {
            "file" => return self.open_directory(rest, create, settings),
            "memory" => (Arc::new(object_store::memory::InMemory::new()), rest),
            "s3" | "gs" | "az" => {
                let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
                if bucket.is_empty() {
                    return Err(self.bad("it names no bucket"));
                }
                // Required once per process before the first HTTPS client; a second call is harmless.
                let _ = rustls::crypto::ring::default_provider().install_default();
                let store = Store::new(self.client(scheme, bucket, false)?, prefix, &self.url, settings);
                let (this, scheme, bucket) = (self.clone(), scheme.to_owned(), bucket.to_owned());
                let store = match scheme == "s3" {
                    false => store,
                    true => {
                        let (this, bucket) = (self.clone(), bucket.clone());
                        store.with_s3(move || this.requests(&bucket))
                    }
                };
                return Ok(store.with_uploads(move || this.client(&scheme, &bucket, true)));
            }
            _ => return Err(self.bad("its scheme is not known")),
        };
        Ok(Store::new(inner, prefix, &self.url, settings))
    }

    fn bad(&self, why: &str) -> Error {
        Error::usage(format!("repository URL {:?}: {why}", self.url))
            .remedy("use file:///folder, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix")
    }

    fn open_directory(&self, path: &str, create: bool, mut settings: StoreSettings) -> Result<Store> {
        if !path.starts_with('/') {
            return Err(self.bad("a folder must be absolute: file:///folder"));
        }
        if self.storage_class.is_some() {
            return Err(Error::usage(format!("storage_class has no meaning for {}", self.url)));
        }
        if create {
            // Whoever may not enter it reads nothing in it; who shares a repository opens it to a group.
            let mut folder = std::fs::DirBuilder::new();
            folder
                .recursive(true)
                .mode(0o700)
                .create(path)
                .map_err(|e| Error::io(format_args!("creating the repository folder {path}"), e))?;
        } else if !std::path::Path::new(path).is_dir() {
            return Err(Error::new(
                crate::error::Kind::Temporary,
                format!("the repository folder {path} is not there"),
            )
            .remedy("mount or create it; `fairvault stanza create` creates it for a new repository"));
        }
        let store = LocalFileSystem::new_with_prefix(path)
            .map_err(|e| Error::failed(format!("opening the repository folder {path}")).caused_by(e))?
            .with_fsync(true);
        settings.retry_timeout = self.retry_timeout.unwrap_or(Duration::from_secs(5));
        let root = Root::of(std::path::Path::new(path));
        settings.root = Some(root.map_err(|e| Error::io(format_args!("looking at {path}"), e))?);
        Ok(Store::new(Arc::new(store), "", &self.url, settings))
    }

    fn client(&self, scheme: &str, bucket: &str, uploads: bool) -> Result<Arc<dyn ObjectStore>> {
        Ok(match scheme {
            "s3" => Arc::new(self.s3(bucket, uploads)?),
            "gs" => Arc::new(self.gcs(bucket, uploads)?),
            _ => Arc::new(self.azure(bucket, uploads)?),
        })
    }

    fn client_options(&self, allow_http: bool, uploads: bool) -> Result<ClientOptions> {
        let mut options = ClientOptions::new()
            .with_connect_timeout(Duration::from_secs(10))
            .with_allow_http(allow_http)
            .with_no_system_certificates(allow_http || self.ca_file.is_some());
        // The limit for silence runs from the request to the answer's first byte, with the body of an upload
        // in between: there, only the whole is limited, so that a pack over a slow line still fits.
        options = match uploads {
            true => options.with_read_timeout_disabled().with_timeout(UPLOAD_LIMIT),
            false => options
                .with_read_timeout(self.request_timeout.unwrap_or(Duration::from_secs(60)))
                .with_timeout(Duration::from_secs(600)),
        };
        if let Some(file) = &self.ca_file {
            let pem = std::fs::read(file).map_err(|e| Error::io(format_args!("reading the CA file {file}"), e))?;
            let certificates = Certificate::from_pem_bundle(&pem)
                .map_err(|e| Error::usage(format!("{file} is no PEM file of certificates")).caused_by(e))?;
            for certificate in certificates {
                options = options.with_root_certificate(certificate);
            }
        }
        Ok(options)
    }

    fn retry(&self) -> RetryConfig {
        RetryConfig {
            backoff: BackoffConfig {
                init_backoff: Duration::from_millis(100),
                max_backoff: Duration::from_secs(15),
                base: 2.0,
            },
            max_retries: 20,
            // Requests are signed once: stay well inside a signature's life.
            retry_timeout: self
                .retry_timeout
                .unwrap_or(Duration::from_secs(180))
                .min(Duration::from_secs(240)),
        }
    }

    /// What speaks about versions and locks.
    fn requests(&self, bucket: &str) -> Result<Arc<S3>> {
        let options = self.client_options(self.is_plain(), false)?;
        Ok(Arc::new(S3::new(self.s3(bucket, false)?, &options)?))
    }

    fn is_plain(&self) -> bool {
        self.endpoint.as_deref().is_some_and(|e| e.starts_with("http://"))
    }

    fn s3(&self, bucket: &str, uploads: bool) -> Result<AmazonS3> {
        self.s3_from(AmazonS3Builder::from_env(), bucket, uploads)
    }

    fn s3_from(&self, builder: AmazonS3Builder, bucket: &str, uploads: bool) -> Result<AmazonS3> {
        let plain = self.is_plain();
        let mut builder = builder
            .with_client_options(self.client_options(plain, uploads)?)
            .with_retry(self.retry())
            .with_bucket_name(bucket)
            .with_virtual_hosted_style_request(self.virtual_host)
            .with_disable_bulk_delete(true)
            .with_disable_tagging(true);
        if let Some(region) = &self.region {
            builder = builder.with_region(region);
        }
        if let Some(endpoint) = &self.endpoint {
            let endpoint = match self.virtual_host {
                true => self.bucket_endpoint(endpoint, bucket)?,
                false => endpoint.clone(),
            };
            builder = builder.with_endpoint(endpoint).with_allow_http(plain);
        }
        if let (Some(key), Some(secret)) = (&self.access_key, &self.secret_key) {
            // Whole: a session token from the environment belongs to the key that is there.
            let credential = AwsCredential {
                key_id: key.clone(),
                secret_key: STAND_IN.to_owned(),
                token: None,
            };
            builder = builder
                .with_credentials(Arc::new(StaticCredentialProvider::new(credential)))
                .with_crypto_provider(Arc::new(Signing::s3(secret)));
        }
        builder = match self.checksum {
            Check::Sha256 => builder.with_checksum_algorithm(Checksum::SHA256),
            Check::Md5 => builder.with_http_connector(<AddMd5>::default()),
            Check::None => builder,
        };
        match self.server_side_encryption.as_deref() {
            None => {}
            Some("aws:kms") => match &self.kms_key {
                Some(key) => builder = builder.with_sse_kms_encryption(key),
                None => return Err(Error::usage("server_side_encryption = \"aws:kms\" needs kms_key")),
            },
            Some("AES256") => {
                let key = "aws_server_side_encryption"
                    .parse::<AmazonS3ConfigKey>()
                    .map_err(|e| Error::failed("the S3 client does not know server-side encryption").caused_by(e))?;
                builder = builder.with_config(key, "AES256");
            }
            Some(other) => {
                return Err(Error::usage(format!(
                    "server_side_encryption = {other:?} is not known: AES256 or aws:kms"
                )));
            }
        }
        builder
            .build()
            .map_err(|e| self.bad("the S3 client cannot be made").caused_by(e))
    }

    /// The client wants the bucket's own endpoint; people write down that of the service.
    fn bucket_endpoint(&self, endpoint: &str, bucket: &str) -> Result<String> {
        let (scheme, host) = endpoint.split_once("://").ok_or_else(|| {
            Error::usage(format!("endpoint = {endpoint:?} is no URL"))
                .remedy("write it as https://host or https://host:port")
        })?;
        Ok(match host.starts_with(&format!("{bucket}.")) {
            true => endpoint.to_owned(),
            false => format!("{scheme}://{bucket}.{host}"),
        })
    }

    fn gcs(&self, bucket: &str, uploads: bool) -> Result<impl ObjectStore> {
        let plain = self.is_plain();
        let mut builder = GoogleCloudStorageBuilder::from_env()
            .with_client_options(self.client_options(plain, uploads)?)
            .with_retry(self.retry())
            .with_bucket_name(bucket);
        if let Some(endpoint) = &self.endpoint {
            builder = builder.with_base_url(endpoint);
        }
        builder
            .build()
            .map_err(|e| self.bad("the GCS client cannot be made").caused_by(e))
    }

    fn azure(&self, container: &str, uploads: bool) -> Result<impl ObjectStore> {
        let plain = self.endpoint.as_deref().is_some_and(|e| e.starts_with("http://"));
        let mut builder = MicrosoftAzureBuilder::from_env()
            .with_client_options(self.client_options(plain, uploads)?)
            .with_retry(self.retry())
            .with_container_name(container);
        if let Some(endpoint) = &self.endpoint {
            builder = builder.with_endpoint(endpoint.clone()).with_allow_http(plain);
        }
        if let (Some(account), Some(key)) = (&self.access_key, &self.secret_key) {
            // What is wrong with it is not told: that would tell of it.
            let signing = Signing::azure(key).ok_or_else(|| {
                Error::usage(format!("the secret key of account {account} is no Base64"))
                    .remedy("put a key of the storage account into its file as it is shown, and nothing else")
            })?;
            let held = AzureAccessKey::try_new(STAND_IN)
                .map_err(|e| Error::failed("the Azure client takes no key").caused_by(e))?;
            // A token from the environment would be taken before it. An emulator looks at the other one only.
            let credential = StaticCredentialProvider::new(AzureCredential::AccessKey(held));
            builder = builder
                .with_account(account)
                .with_access_key(STAND_IN)
                .with_credentials(Arc::new(credential))
                .with_crypto_provider(Arc::new(signing));
        }
        builder
            .build()
            .map_err(|e| self.bad("the Azure client cannot be made").caused_by(e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_client_does_not_hold_the_configured_secret() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let url = RepositoryUrl {
            url: "s3://b/p".to_owned(),
            endpoint: Some("http://127.0.0.1:1".to_owned()),
            access_key: Some("k".to_owned()),
            secret_key: Some(Zeroizing::new("the secret".to_owned())),
            ..RepositoryUrl::default()
        };
        // What the environment holds is not mixed with it.
        let environment = AmazonS3Builder::new().with_access_key_id("e").with_token("of e");
        let client = url.s3_from(environment, "b", false).unwrap();
        let held = client.credentials().get_credential().await.unwrap();
        assert_eq!((held.key_id.as_str(), held.secret_key.as_str()), ("k", STAND_IN));
        assert_eq!(held.token, None);
        assert!(!format!("{url:?} {client:?}").contains("the secret"));
    }
}

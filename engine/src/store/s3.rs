//! Signed S3 requests about buckets, versions and locks, which the object-store client does not make.
//!
//! The client signs a URL; this sends it, over the same kind of connection and with the same patience. Bodies are sent
//! with their MD5, answers are read up to a limit.

use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::{Bytes, BytesMut};
use futures::TryStreamExt;
use md5::{Digest, Md5};
use object_store::aws::AmazonS3;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpRequest, HttpRequestBody, HttpResponse, HttpService, ReqwestConnector,
};
use object_store::path::Path;
use object_store::signer::{HeaderName, HeaderValue, Method, SignedUrlOptions, Signer};
use object_store::{ClientOptions, PutPayload};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use crate::error::{Error, Result};

/// How long a signature lasts.
const SIGNED_FOR: Duration = Duration::from_secs(300);
/// Longest answer: a page of a thousand versions has less than two MiB.
const ANSWER_BYTES: usize = 8 << 20;
/// Longest wait between two attempts.
const LONGEST_WAIT: Duration = Duration::from_secs(10);
const CONTENT_MD5: HeaderName = HeaderName::from_static("content-md5");

/// Whoever sends them.
#[derive(Debug)]
pub struct S3 {
    signer: AmazonS3,
    http: HttpClient,
}

/// A request.
#[derive(Debug)]
pub struct Request<'a> {
    pub method: Method,
    /// The object; none for the bucket.
    pub path: &'a Path,
    pub query: Vec<(&'static str, String)>,
    pub body: String,
}

/// What the store said: anything but that it should be asked again later.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    body: Bytes,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Refusal {
    code: String,
    message: String,
}

impl Answer {
    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }

    /// Status, and the store's own words.
    pub fn words(&self) -> String {
        let refusal: Refusal = self.parse().unwrap_or_default();
        format!("{} {} {}", self.status, refusal.code, refusal.message)
            .trim_end()
            .to_owned()
    }

    /// The body, as XML.
    pub fn parse<T: DeserializeOwned>(&self) -> std::result::Result<T, quick_xml::DeError> {
        quick_xml::de::from_reader(&self.body[..])
    }

    fn is_to_be_repeated(&self) -> bool {
        let throttled = || {
            let text = String::from_utf8_lossy(&self.body);
            ["RequestRateLimitExceeded", "SlowDown", "RequestTimeout"]
                .iter()
                .any(|code| text.contains(&format!("<Code>{code}</Code>")))
        };
        matches!(self.status, 429 | 500 | 502..=599) || self.status == 400 && throttled()
    }
}

impl S3 {
    pub fn new(signer: AmazonS3, options: &ClientOptions) -> Result<Self> {
        let http = ReqwestConnector::default().connect(options);
        Ok(Self {
            signer,
            http: http.map_err(|e| Error::failed("the HTTP client cannot be made").caused_by(e))?,
        })
    }

    /// Sends a request until it is answered, for as long as `patience` lasts. `doing` is what an error says.
    pub async fn send(&self, request: &Request<'_>, patience: Duration, doing: &str) -> Result<Answer> {
        let deadline = Instant::now() + patience;
        let mut wait = Duration::from_millis(200);
        loop {
            let error = match self.once(request).await {
                Ok(answer) if !answer.is_to_be_repeated() => return Ok(answer),
                Ok(answer) => Error::temporary(format!("{doing}: {}", answer.words())),
                Err(error) => error.context(doing),
            };
            if Instant::now() + wait > deadline {
                return Err(error);
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(LONGEST_WAIT);
        }
    }

    async fn once(&self, request: &Request<'_>) -> Result<Answer> {
        let mut options = SignedUrlOptions::default().with_query(request.query.iter().cloned());
        let md5 = match request.body.is_empty() {
            true => None,
            false => ContentMd5::of(&PutPayload::from(request.body.clone())).0,
        };
        if let Some(md5) = &md5 {
            options = options.with_signed_header(CONTENT_MD5, md5.clone());
        }
        let method = request.method.clone();
        let signed = self.signer.signed_url_opts(method, request.path, SIGNED_FOR, &options);
        let url = signed
            .await
            .map_err(|e| Error::failed("a request cannot be signed").caused_by(e))?;
        let mut sent = HttpRequest::new(match request.body.is_empty() {
            true => HttpRequestBody::empty(),
            false => request.body.clone().into(),
        });
        *sent.method_mut() = request.method.clone();
        *sent.uri_mut() = url
            .as_str()
            .parse()
            .map_err(|_| Error::failed(format!("{} is no URL", request.path)))?;
        if let Some(md5) = md5 {
            sent.headers_mut().insert(CONTENT_MD5, md5);
        }
        let lost = |e: HttpError| Error::temporary("the store did not answer").caused_by(e);
        let answered = self.http.execute(sent).await.map_err(lost)?;
        let status = answered.status().as_u16();
        let mut stream = answered.into_body().bytes_stream();
        let mut body = BytesMut::new();
        while let Some(part) = stream.try_next().await.map_err(lost)? {
            if body.len() + part.len() > ANSWER_BYTES {
                return Err(Error::failed("the store's answer is too long"));
            }
            body.extend_from_slice(&part);
        }
        Ok(Answer {
            status,
            body: body.freeze(),
        })
    }
}

/// The MD5 of a body, as its header has it.
#[derive(Debug, Clone)]
pub struct ContentMd5(Option<HeaderValue>);

impl ContentMd5 {
    pub fn of(payload: &PutPayload) -> Self {
        let mut md5 = Md5::new();
        payload.iter().for_each(|part| md5.update(part));
        Self(HeaderValue::from_str(&BASE64_STANDARD.encode(md5.finalize())).ok())
    }
}

/// Connects so that uploads that come with their [`ContentMd5`] carry it as header.
#[derive(Debug, Default)]
pub struct AddMd5<C = ReqwestConnector>(C);

impl<C: HttpConnector> HttpConnector for AddMd5<C> {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(Adding(self.0.connect(options)?)))
    }
}

#[derive(Debug)]
struct Adding(HttpClient);

#[async_trait::async_trait]
impl HttpService for Adding {
    async fn call(&self, mut request: HttpRequest) -> std::result::Result<HttpResponse, HttpError> {
        if let Some(ContentMd5(Some(md5))) = request.extensions_mut().remove() {
            request.headers_mut().insert(CONTENT_MD5, md5);
        }
        self.0.execute(request).await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use object_store::aws::AmazonS3Builder;
    use object_store::client::HttpResponseBody;

    use super::*;
    use crate::store::{Store, StoreSettings};

    /// Notes the MD5 headers of what is sent, and is content with everything.
    #[derive(Debug, Clone, Default)]
    struct Listener(Arc<Mutex<Vec<Option<HeaderValue>>>>);

    impl HttpConnector for Listener {
        fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
            Ok(HttpClient::new(self.clone()))
        }
    }

    #[async_trait::async_trait]
    impl HttpService for Listener {
        async fn call(&self, request: HttpRequest) -> std::result::Result<HttpResponse, HttpError> {
            self.0.lock().unwrap().push(request.headers().get(CONTENT_MD5).cloned());
            let mut response = HttpResponse::new(HttpResponseBody::from(Bytes::new()));
            response.headers_mut().insert("etag", HeaderValue::from_static("\"e\""));
            Ok(response)
        }
    }

    #[tokio::test]
    async fn uploads_carry_their_md5_if_that_is_asked_for() {
        for asked in [true, false] {
            let listener = Listener::default();
            let client = AmazonS3Builder::new()
                .with_bucket_name("b")
                .with_access_key_id("k")
                .with_secret_access_key("s")
                .with_http_connector(AddMd5(listener.clone()))
                .build()
                .unwrap();
            let settings = StoreSettings {
                content_md5: asked,
                ..Default::default()
            };
            let store = Store::new(Arc::new(client), "", "s3://b", settings);
            store.put_hashed("x", Bytes::from_static(b"abc").into()).await.unwrap();
            store.create("y", Bytes::from_static(b"abc"), 9).await.unwrap();
            let header = asked.then(|| HeaderValue::from_static("kAFQmDzST7DWlj99KOF/cg=="));
            assert_eq!(*listener.0.lock().unwrap(), [header.clone(), header]);
        }
    }

    fn answer(status: u16, body: &'static str) -> Answer {
        Answer {
            status,
            body: Bytes::from_static(body.as_bytes()),
        }
    }

    #[test]
    fn refusals_are_told_in_the_stores_words() {
        let denied = answer(
            403,
            "<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code><Message>No.</Message><X><Y/></X></Error>",
        );
        assert_eq!(denied.words(), "403 AccessDenied No.");
        assert!(!denied.is_to_be_repeated());
        assert_eq!(answer(404, "gone").words(), "404");
        assert!(answer(503, "").is_to_be_repeated() && !answer(501, "").is_to_be_repeated());
        let throttled = "<Error><Code>RequestRateLimitExceeded</Code></Error>";
        assert!(answer(400, throttled).is_to_be_repeated() && !answer(400, "<Error/>").is_to_be_repeated());
    }

    #[test]
    fn the_md5_is_that_of_all_parts() {
        let payload: PutPayload = ["a", "bc"].into_iter().map(Bytes::from).collect();
        let ContentMd5(md5) = ContentMd5::of(&payload);
        assert_eq!(md5.unwrap(), "kAFQmDzST7DWlj99KOF/cg==");
    }
}

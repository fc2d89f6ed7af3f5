//! Client of OPA's REST API (OPA v1/server/server.go).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use opa_hub_proto::path::DirPath;
use opa_hub_proto::revision::Revision;
use reqwest::header::{AUTHORIZATION, IF_NONE_MATCH};
use reqwest::redirect::Policy;
use reqwest::{Body, Client, Method, RequestBuilder, Response, StatusCode};
use serde::Deserialize;

use super::marker::{Marker, WRITER};
use crate::config::{OpaConfig, Token};
use crate::http;

/// A directory of thousands of entries needs a second.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);
const READ_TIMEOUT: Duration = Duration::from_secs(5);
/// Enough for a marker of 20,000 directories.
const RESPONSE_BYTES_MAX: usize = 16 << 20;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("creating the client for OPA failed: {0}; check --opa-ca-file and the certificates of the image")]
    Client(String),
    #[error("reading the token for OPA failed: {0}; check --opa-auth-token-file")]
    Token(std::io::Error),
    #[error("request to OPA failed: {0}")]
    Unreachable(#[from] reqwest::Error),
    #[error("OPA lacks a path that the agent wrote: {0}")]
    Missing(String),
    #[error("OPA rejected {request} with {status}: {message}")]
    Rejected { request: String, status: StatusCode, message: String },
    #[error("parsing OPA's response to {request} failed: {source}")]
    Response { request: String, source: serde_json::Error },
}

impl Error {
    /// Whether OPA would reject the same content again.
    pub(crate) fn is_permanent(&self) -> bool {
        let is_final = |status| matches!(status, StatusCode::BAD_REQUEST | StatusCode::PAYLOAD_TOO_LARGE);
        matches!(self, Self::Rejected { status, .. } if is_final(*status))
    }

    pub(crate) fn message(self) -> String {
        match self {
            Self::Rejected { message, .. } => message,
            other => other.to_string(),
        }
    }
}

/// Start of the large syntax tree in OPA's response; JSON strings escape such quotes (OPA v1/server/types/types.go,
/// `PolicyV1`).
const SYNTAX_TREE: &[u8] = b",\"ast\":";

/// Resolved without a thread; port 0 selects the port of the URL.
const LOCALHOST: [SocketAddr; 2] = [
    SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0),
    SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), 0),
];

#[derive(Clone)]
pub(crate) struct OpaClient {
    client: Client,
    config: OpaConfig,
}

#[derive(Deserialize)]
struct Payload<T> {
    result: Option<T>,
}

impl OpaClient {
    pub(crate) fn new(config: OpaConfig) -> Result<Self, Error> {
        let mut builder = Client::builder()
            .no_proxy()
            .redirect(Policy::none())
            .resolve_to_addrs("localhost", &LOCALHOST)
            .tcp_nodelay(true)
            .pool_max_idle_per_host(2);
        if let Some(file) = &config.ca_file {
            builder = builder.tls_certs_merge(http::ca_certificates(file).map_err(Error::Client)?);
        }
        if config.allow_insecure {
            builder = builder.tls_danger_accept_invalid_certs(true);
        }
        if config.url.scheme() == "http" {
            builder = builder.tls_certs_only([]);
        }
        let client = builder.build().map_err(|error| Error::Client(error.to_string()))?;
        Ok(Self { client, config })
    }

    /// Returns `None` if OPA was never loaded. A marker that does not parse is reduced to its names.
    pub(crate) async fn marker(&self, bundle: &str) -> Result<Option<Marker>, Error> {
        match self.read(&Marker::path(bundle)).await {
            Err(error @ Error::Response { .. }) => {
                tracing::warn!(%error, "marker does not parse, repairing OPA");
                let json: Option<serde_json::Value> = self.read(&Marker::path(bundle)).await?;
                Ok(json.as_ref().and_then(Marker::from_names))
            }
            other => other,
        }
    }

    pub(crate) async fn has_revision(&self, bundle: &str, revision: Option<Revision>) -> Result<bool, Error> {
        let Some(revision) = revision else { return Ok(false) };
        self.is_true(bundle, &format!(".revision == \"{revision}\"")).await
    }

    pub(crate) async fn has_marker(&self, bundle: &str) -> Result<bool, Error> {
        self.is_true(bundle, "").await
    }

    pub(crate) async fn has_writer(&self, bundle: &str, writer: &str) -> Result<bool, Error> {
        self.is_true(bundle, &format!("[\"{WRITER}\"][\"{writer}\"]")).await
    }

    /// Partial evaluation keeps the query out of decision logs (OPA v1/server/server.go, `v1CompilePost`).
    async fn is_true(&self, bundle: &str, condition: &str) -> Result<bool, Error> {
        #[derive(Deserialize, Default)]
        struct Partial {
            #[serde(default)]
            queries: Vec<serde::de::IgnoredAny>,
        }
        let path = Marker::path(bundle).relative().replace('/', "\"][\"");
        let query = format!("data[\"{path}\"]{condition}");
        let query = serde_json::json!({ "query": query }).to_string();
        let request = "compile".to_owned();
        let send =
            self.send(Method::POST, &request, Some(query.into()), |request| request.timeout(READ_TIMEOUT));
        let body = http::read(send.await?, RESPONSE_BYTES_MAX).await?;
        let response: Payload<Partial> =
            serde_json::from_slice(&body).map_err(|source| Error::Response { request, source })?;
        Ok(!response.result.unwrap_or_default().queries.is_empty())
    }

    async fn read<T: serde::de::DeserializeOwned>(&self, path: &DirPath) -> Result<Option<T>, Error> {
        let request = format!("data{path}");
        let response =
            self.send(Method::GET, &request, None, |request| request.timeout(READ_TIMEOUT)).await?;
        let body = http::read(response, RESPONSE_BYTES_MAX).await?;
        let response: Payload<T> =
            serde_json::from_slice(&body).map_err(|source| Error::Response { request, source })?;
        Ok(response.result)
    }

    pub(crate) async fn patch(&self, patch: Vec<u8>) -> Result<(), Error> {
        self.send(Method::PATCH, "data", Some(patch.into()), |request| request).await.map(drop)
    }

    /// Creates `dir` and its parents as maps. Returns whether `dir` existed (OPA v1/server/server.go, `v1DataPut`).
    pub(crate) async fn ensure(&self, dir: &DirPath) -> Result<bool, Error> {
        let request = format!("data{dir}");
        let body = Bytes::from_static(b"{}");
        let response = self
            .send(Method::PUT, &request, Some(body), |request| request.header(IF_NONE_MATCH, "*"))
            .await?;
        Ok(response.status() == StatusCode::NOT_MODIFIED)
    }

    pub(crate) async fn module(&self, id: &str) -> Result<Option<String>, Error> {
        #[derive(Deserialize)]
        struct Policy {
            raw: String,
        }
        let request = format!("policies/{id}");
        let mut response = match self.send(Method::GET, &request, None, |request| request).await {
            Err(Error::Missing(_)) => return Ok(None),
            other => http::read_until(other?, SYNTAX_TREE, RESPONSE_BYTES_MAX).await?,
        };
        if let Some(text) = response.strip_suffix(SYNTAX_TREE) {
            response = [text, b"}}"].concat();
        }
        let response: Payload<Policy> =
            serde_json::from_slice(&response).map_err(|source| Error::Response { request, source })?;
        Ok(response.result.map(|policy| policy.raw))
    }

    pub(crate) async fn put_module(&self, id: &str, text: String) -> Result<(), Error> {
        self.send(Method::PUT, &format!("policies/{id}"), Some(text.into()), |request| request)
            .await
            .map(drop)
    }

    pub(crate) async fn delete_module(&self, id: &str) -> Result<(), Error> {
        match self.send(Method::DELETE, &format!("policies/{id}"), None, |request| request).await {
            Err(Error::Missing(_)) => Ok(()),
            other => other.map(drop),
        }
    }

    pub(crate) async fn keys(&self, dir: &DirPath) -> Result<Vec<String>, Error> {
        #[derive(Deserialize)]
        struct Binding {
            keys: Vec<String>,
        }
        let path = dir.relative().replace('/', "\"][\"");
        let query =
            serde_json::json!({ "query": format!("keys = object.keys(data[\"{path}\"])") }).to_string();
        let request = "query".to_owned();
        let response = self.send(Method::POST, &request, Some(query.into()), |request| request).await?;
        let body = http::read(response, RESPONSE_BYTES_MAX).await?;
        let response: Payload<Vec<Binding>> =
            serde_json::from_slice(&body).map_err(|source| Error::Response { request, source })?;
        Ok(response.result.into_iter().flatten().flat_map(|binding| binding.keys).collect())
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<Bytes>,
        customize: impl FnOnce(RequestBuilder) -> RequestBuilder,
    ) -> Result<Response, Error> {
        let url = self.config.url.join(path).expect("generated paths are valid in URLs");
        let mut request = self.client.request(method.clone(), url).timeout(WRITE_TIMEOUT);
        if let Some(token) = &self.config.token {
            let token = match token {
                Token::Text(token) => token.clone(),
                Token::File(path) => {
                    let text = std::fs::read_to_string(path).map_err(Error::Token)?;
                    text.lines().next().unwrap_or_default().to_owned()
                }
            };
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        if let Some(body) = body {
            request = request.body(Body::from(body));
        }
        let response = customize(request).send().await?;
        let status = response.status();
        if status.is_success() || status == StatusCode::NOT_MODIFIED {
            return Ok(response);
        }
        let message = http::message(response).await;
        let request = format!("{method} /v1/{path}");
        if status == StatusCode::NOT_FOUND {
            return Err(Error::Missing(format!("{request}: {message}")));
        }
        Err(Error::Rejected { request, status, message })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::opa::fake_opa::FakeOpa;

    #[tokio::test]
    async fn responses_are_parsed() {
        let (fake, opa) = FakeOpa::start().await;
        let dir: DirPath = "/a/b".parse().unwrap();
        assert!(opa.keys(&dir).await.unwrap().is_empty());
        assert!(!opa.ensure(&dir).await.unwrap() && opa.ensure(&dir).await.unwrap());
        fake.with(|world| world.data["a"]["b"] = json!({ "x": null, "y": 1 }));
        assert_eq!(opa.keys(&dir).await.unwrap(), ["x", "y"]);
        assert_eq!(opa.module("n/c/m.rego").await.unwrap(), None);
        let text = "has \",\"ast\":{\n";
        opa.put_module("n/c/m.rego", text.to_owned()).await.unwrap();
        assert_eq!(opa.module("n/c/m.rego").await.unwrap().as_deref(), Some(text));
        let error = opa.put_module("n/c/o.rego", "odd".to_owned()).await.unwrap_err();
        assert!(error.is_permanent() && error.message().contains("undefined function odd"));
        opa.delete_module("n/c/m.rego").await.unwrap();
        opa.delete_module("n/c/m.rego").await.unwrap();
        fake.with(|world| world.fails_after = Some(0));
        assert!(!opa.delete_module("n/c/m.rego").await.unwrap_err().is_permanent());
        assert!(matches!(opa.patch(b"[]".to_vec()).await, Err(Error::Rejected { .. })));
    }
}

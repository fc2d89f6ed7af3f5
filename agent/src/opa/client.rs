//! A tiny client of OPA's REST API (OPA v1/server/server.go).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use bytes::Bytes;
use opa_hub_proto::path::DirPath;
use opa_hub_proto::revision::Revision;
use reqwest::header::{AUTHORIZATION, IF_NONE_MATCH};
use reqwest::redirect::Policy;
use reqwest::{Body, Client, Method, RequestBuilder, Response, StatusCode};
use serde::Deserialize;

use crate::authorities::authorities;
use crate::body;
use crate::config::{ANSWER_BYTES_MAX, OPA_READ, OPA_WRITE, OpaConfig, Token};
use crate::marker::{Marker, WRITER};

/// Why OPA did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The client could not be made.
    #[error("making a client for OPA failed: {0}; check --opa-ca-file and the certificates of the image")]
    Client(String),
    /// The token file cannot be read.
    #[error("cannot read the token for OPA: {0}")]
    Token(std::io::Error),
    /// OPA is not there, or did not answer.
    #[error("OPA does not answer: {0}")]
    Unreachable(#[from] reqwest::Error),
    /// A path that must exist does not: OPA does not hold what it was believed to.
    #[error("OPA lacks a path that it should hold: {0}")]
    Missing(String),
    /// OPA says no.
    #[error("OPA refuses {what} with {status}: {message}")]
    Refused {
        /// What was asked.
        what: String,
        /// The answer's status.
        status: StatusCode,
        /// OPA's words.
        message: String,
    },
    /// OPA's answer is not what its API promises.
    #[error("OPA's answer to {what} does not parse: {source}")]
    Answer {
        /// What was asked.
        what: String,
        /// Where it fails.
        source: serde_json::Error,
    },
}

impl Error {
    /// Whether OPA says no to what it was given, and would again; else to who gave it, or to everybody for a while.
    pub fn is_verdict(&self) -> bool {
        let is_final = |status| matches!(status, StatusCode::BAD_REQUEST | StatusCode::PAYLOAD_TOO_LARGE);
        matches!(self, Self::Refused { status, .. } if is_final(*status))
    }

    /// OPA's own, where it said some.
    pub fn words(self) -> String {
        match self {
            Self::Refused { message, .. } => message,
            other => other.to_string(),
        }
    }
}

/// Beginning of the syntax tree in OPA's answer with a module, many times as large as the text before it. A text of JSON
/// has no such quote without a backslash (OPA v1/server/types/types.go, `PolicyV1`).
const SYNTAX_TREE: &[u8] = b",\"ast\":";

/// OPA's usual host, which needs no thread to be resolved. The port is that of the URL.
const LOCALHOST: [SocketAddr; 2] = [
    SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0),
    SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), 0),
];

/// The client.
#[derive(Clone)]
pub struct Opa {
    client: Client,
    config: OpaConfig,
}

#[derive(Deserialize)]
struct Answer<T> {
    result: Option<T>,
}

impl Opa {
    /// A client for the OPA at `config`.
    pub fn new(config: OpaConfig) -> Result<Self, Error> {
        let mut builder = Client::builder()
            .no_proxy()
            .redirect(Policy::none())
            .resolve_to_addrs("localhost", &LOCALHOST)
            .tcp_nodelay(true)
            .pool_max_idle_per_host(2);
        if let Some(file) = &config.ca_file {
            builder = builder.tls_certs_merge(authorities(file).map_err(Error::Client)?);
        }
        if config.allow_insecure {
            builder = builder.tls_danger_accept_invalid_certs(true);
        }
        if config.url.scheme() == "http" {
            // An image without certificates of authorities will do.
            builder = builder.tls_certs_only([]);
        }
        let client = builder.build().map_err(|error| Error::Client(error.to_string()))?;
        Ok(Self { client, config })
    }

    /// What OPA says that it holds of `bundle`; none when it was never loaded.
    /// Of a marker that does not parse (another version's, somebody else's) only the names are believed.
    pub async fn marker(&self, bundle: &str) -> Result<Option<Marker>, Error> {
        match self.read(&Marker::path(bundle)).await {
            Err(error @ Error::Answer { .. }) => {
                tracing::warn!(%error, "marker does not parse, repairing what it names");
                let json: Option<serde_json::Value> = self.read(&Marker::path(bundle)).await?;
                Ok(json.as_ref().and_then(Marker::of_names))
            }
            other => other,
        }
    }

    /// Whether OPA holds this revision of `bundle`.
    pub async fn holds(&self, bundle: &str, revision: Option<Revision>) -> Result<bool, Error> {
        let Some(revision) = revision else { return Ok(false) };
        self.is_true(bundle, &format!(".revision == \"{revision}\"")).await
    }

    /// Whether OPA holds anything of `bundle`: it has not restarted since it was first given some.
    pub async fn has_marker(&self, bundle: &str) -> Result<bool, Error> {
        self.is_true(bundle, "").await
    }

    /// Whether OPA holds the marker of `bundle` and `writer` is the last session that claimed it.
    pub async fn has_writer(&self, bundle: &str, writer: &str) -> Result<bool, Error> {
        self.is_true(bundle, &format!("[\"{WRITER}\"][\"{writer}\"]")).await
    }

    /// Whether `condition` is true of the marker. Asked by partial evaluation, which no decision log shows (OPA
    /// v1/server/server.go, `v1CompilePost`).
    async fn is_true(&self, bundle: &str, condition: &str) -> Result<bool, Error> {
        #[derive(Deserialize, Default)]
        struct Partial {
            #[serde(default)]
            queries: Vec<serde::de::IgnoredAny>,
        }
        let path = Marker::path(bundle).relative().replace('/', "\"][\"");
        let query = format!("data[\"{path}\"]{condition}");
        let query = serde_json::json!({ "query": query }).to_string();
        let what = "compile".to_owned();
        let send = self.send(Method::POST, &what, Some(query.into()), |request| request.timeout(OPA_READ));
        let body = body::read(send.await?, ANSWER_BYTES_MAX).await?;
        let answer: Answer<Partial> =
            serde_json::from_slice(&body).map_err(|source| Error::Answer { what, source })?;
        Ok(!answer.result.unwrap_or_default().queries.is_empty())
    }

    async fn read<T: serde::de::DeserializeOwned>(&self, path: &DirPath) -> Result<Option<T>, Error> {
        let what = format!("data{path}");
        let answer = self.send(Method::GET, &what, None, |request| request.timeout(OPA_READ)).await?;
        let body = body::read(answer, ANSWER_BYTES_MAX).await?;
        let answer: Answer<T> =
            serde_json::from_slice(&body).map_err(|source| Error::Answer { what, source })?;
        Ok(answer.result)
    }

    /// Applies a JSON patch in one transaction.
    pub async fn patch(&self, patch: Vec<u8>) -> Result<(), Error> {
        self.send(Method::PATCH, "data", Some(patch.into()), |request| request).await.map(drop)
    }

    /// Makes `dir` a map if nothing is there. Parents are made too. Returns whether something was there: OPA finds out
    /// without reading it, and without a decision (OPA v1/server/server.go, `v1DataPut`).
    pub async fn ensure(&self, dir: &DirPath) -> Result<bool, Error> {
        let what = format!("data{dir}");
        let body = Bytes::from_static(b"{}");
        let answer =
            self.send(Method::PUT, &what, Some(body), |request| request.header(IF_NONE_MATCH, "*")).await?;
        Ok(answer.status() == StatusCode::NOT_MODIFIED)
    }

    /// The text of a module; none when there is no such module.
    pub async fn module(&self, id: &str) -> Result<Option<String>, Error> {
        #[derive(Deserialize)]
        struct Policy {
            raw: String,
        }
        let what = format!("policies/{id}");
        let mut answer = match self.send(Method::GET, &what, None, |request| request).await {
            Err(Error::Missing(_)) => return Ok(None),
            other => body::read_until(other?, SYNTAX_TREE, ANSWER_BYTES_MAX).await?,
        };
        if let Some(text) = answer.strip_suffix(SYNTAX_TREE) {
            answer = [text, b"}}"].concat();
        }
        let answer: Answer<Policy> =
            serde_json::from_slice(&answer).map_err(|source| Error::Answer { what, source })?;
        Ok(answer.result.map(|policy| policy.raw))
    }

    /// Adds or replaces a module.
    pub async fn put_module(&self, id: &str, text: String) -> Result<(), Error> {
        self.send(Method::PUT, &format!("policies/{id}"), Some(text.into()), |request| request)
            .await
            .map(drop)
    }

    /// Removes a module; one that is not there is removed already.
    pub async fn delete_module(&self, id: &str) -> Result<(), Error> {
        match self.send(Method::DELETE, &format!("policies/{id}"), None, |request| request).await {
            Err(Error::Missing(_)) => Ok(()),
            other => other.map(drop),
        }
    }

    /// The keys of the map at `dir`; none when there is no map.
    pub async fn keys(&self, dir: &DirPath) -> Result<Vec<String>, Error> {
        #[derive(Deserialize)]
        struct Binding {
            keys: Vec<String>,
        }
        let path = dir.relative().replace('/', "\"][\"");
        let query =
            serde_json::json!({ "query": format!("keys = object.keys(data[\"{path}\"])") }).to_string();
        let what = "query".to_owned();
        let answer = self.send(Method::POST, &what, Some(query.into()), |request| request).await?;
        let body = body::read(answer, ANSWER_BYTES_MAX).await?;
        let answer: Answer<Vec<Binding>> =
            serde_json::from_slice(&body).map_err(|source| Error::Answer { what, source })?;
        Ok(answer.result.into_iter().flatten().flat_map(|binding| binding.keys).collect())
    }

    async fn send(
        &self,
        method: Method,
        what: &str,
        body: Option<Bytes>,
        with: impl FnOnce(RequestBuilder) -> RequestBuilder,
    ) -> Result<Response, Error> {
        let url = self.config.url.join(what).expect("names of our own are URL paths");
        let mut request = self.client.request(method.clone(), url).timeout(OPA_WRITE);
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
        let response = with(request).send().await?;
        let status = response.status();
        if status.is_success() || status == StatusCode::NOT_MODIFIED {
            return Ok(response);
        }
        let message = body::words(response).await;
        let what = format!("{method} /v1/{what}");
        if status == StatusCode::NOT_FOUND {
            return Err(Error::Missing(format!("{what}: {message}")));
        }
        Err(Error::Refused { what, status, message })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::fake_opa::FakeOpa;

    #[tokio::test]
    async fn answers_are_read() {
        let (fake, opa) = FakeOpa::start().await;
        let dir: DirPath = "/a/b".parse().unwrap();
        assert!(opa.keys(&dir).await.unwrap().is_empty());
        assert!(!opa.ensure(&dir).await.unwrap() && opa.ensure(&dir).await.unwrap());
        fake.with(|world| world.data["a"]["b"] = json!({ "x": null, "y": 1 }));
        assert_eq!(opa.keys(&dir).await.unwrap(), ["x", "y"]);
        assert_eq!(opa.module("n/c/m.rego").await.unwrap(), None);
        // The text looks like what follows it in OPA's answer.
        let text = "has \",\"ast\":{\n";
        opa.put_module("n/c/m.rego", text.to_owned()).await.unwrap();
        assert_eq!(opa.module("n/c/m.rego").await.unwrap().as_deref(), Some(text));
        let error = opa.put_module("n/c/o.rego", "odd".to_owned()).await.unwrap_err();
        assert!(error.is_verdict() && error.words().contains("undefined function odd"));
        opa.delete_module("n/c/m.rego").await.unwrap();
        opa.delete_module("n/c/m.rego").await.unwrap();
        fake.with(|world| world.fails_after = Some(0));
        assert!(!opa.delete_module("n/c/m.rego").await.unwrap_err().is_verdict());
        assert!(matches!(opa.patch(b"[]".to_vec()).await, Err(Error::Refused { .. })));
    }
}

//! Helpers of the HTTP clients.

use std::path::Path;

use reqwest::{Certificate, Response};

/// Larger than any error of the hub or OPA.
const MESSAGE_BYTES_MAX: usize = 2 << 10;

pub(crate) async fn read(mut response: Response, max: usize) -> reqwest::Result<Vec<u8>> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        body.extend_from_slice(&chunk[..chunk.len().min(max - body.len())]);
        if body.len() == max {
            break;
        }
    }
    Ok(body)
}

/// Reads up to and including `end`.
pub(crate) async fn read_until(mut response: Response, end: &[u8], max: usize) -> reqwest::Result<Vec<u8>> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        // `end` may begin in the previous chunk.
        let start = body.len().saturating_sub(end.len());
        body.extend_from_slice(&chunk[..chunk.len().min(max - body.len())]);
        if let Some(offset) = body[start..].windows(end.len()).position(|bytes| bytes == end) {
            body.truncate(start + offset + end.len());
            break;
        }
        if body.len() == max {
            break;
        }
    }
    Ok(body)
}

/// Returns one line, empty if the body cannot be read.
pub(crate) async fn message(response: Response) -> String {
    let body = read(response, MESSAGE_BYTES_MAX).await.unwrap_or_default();
    String::from_utf8_lossy(&body).split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A file without certificates is an error: a truncated mount must not look like an untrusted server.
pub(crate) fn ca_certificates(file: &Path) -> Result<Vec<Certificate>, String> {
    let failed = |cause: &dyn std::fmt::Display| format!("{}: {cause}", file.display());
    let pem = std::fs::read(file).map_err(|error| failed(&error))?;
    let certificates = Certificate::from_pem_bundle(&pem).map_err(|error| failed(&error))?;
    if certificates.is_empty() {
        return Err(failed(&"the file has no certificate in PEM"));
    }
    Ok(certificates)
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use bytes::Bytes;
    use futures::stream;
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn endless_bodies_are_read_to_their_bound() {
        let endless = || async {
            let line = Bytes::from_static(b"sorry,\n  no\n");
            Body::from_stream(stream::repeat_with(move || Ok::<_, std::convert::Infallible>(line.clone())))
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let router = axum::Router::new().route("/", axum::routing::get(endless));
        tokio::spawn(async move { axum::serve(listener, router).await });
        _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let client = reqwest::Client::builder().no_proxy().tls_certs_only([]).build().unwrap();
        let message = message(client.get(&url).send().await.unwrap()).await;
        assert!(message.starts_with("sorry, no sorry,") && message.len() <= MESSAGE_BYTES_MAX, "{message}");
        assert_eq!(read(client.get(&url).send().await.unwrap(), 100_000).await.unwrap().len(), 100_000);
        for (end, max, expected) in
            [("\n  n", 100, "sorry,\n  n"), ("o\nso", 100, "sorry,\n  no\nso"), ("?", 4, "sorr")]
        {
            let response = client.get(&url).send().await.unwrap();
            let body = read_until(response, end.as_bytes(), max).await.unwrap();
            assert_eq!(String::from_utf8(body).unwrap(), expected);
        }
    }

    #[test]
    fn file_without_certificates_is_rejected() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for text in ["", "no certificate\n", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
        {
            std::fs::write(file.path(), text).unwrap();
            let error = ca_certificates(file.path()).unwrap_err();
            assert!(
                error.contains(&file.path().display().to_string()) && error.contains("no certificate"),
                "{error}"
            );
        }
        assert!(ca_certificates(Path::new("/nowhere/ca.pem")).unwrap_err().starts_with("/nowhere/ca.pem: "));
    }
}

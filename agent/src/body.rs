//! Bodies of answers, bounded: whoever answers may send for ever.

use reqwest::Response;

/// Maximum bytes of an answer's words that are shown: more than any error of a hub or of OPA.
pub const WORDS_MAX: usize = 2 << 10;

/// Reads a body, `max` bytes of it at most.
pub async fn read(mut response: Response, max: usize) -> reqwest::Result<Vec<u8>> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        body.extend_from_slice(&chunk[..chunk.len().min(max - body.len())]);
        if body.len() == max {
            break;
        }
    }
    Ok(body)
}

/// Reads a body up to and with `end`, `max` bytes of it at most.
pub async fn read_until(mut response: Response, end: &[u8], max: usize) -> reqwest::Result<Vec<u8>> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        // The end may have begun in the chunk before.
        let from = body.len().saturating_sub(end.len());
        body.extend_from_slice(&chunk[..chunk.len().min(max - body.len())]);
        if let Some(at) = body[from..].windows(end.len()).position(|bytes| bytes == end) {
            body.truncate(from + at + end.len());
            break;
        }
        if body.len() == max {
            break;
        }
    }
    Ok(body)
}

/// What an answer says of a refusal, on one line; nothing where it breaks off.
pub async fn words(response: Response) -> String {
    let body = read(response, WORDS_MAX).await.unwrap_or_default();
    String::from_utf8_lossy(&body).split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use bytes::Bytes;
    use futures::stream;
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn an_endless_body_is_read_to_its_bound() {
        let endless = || async {
            let line = Bytes::from_static(b"sorry,\n  no\n");
            Body::from_stream(stream::repeat_with(move || Ok::<_, std::convert::Infallible>(line.clone())))
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let router = axum::Router::new().route("/", axum::routing::get(endless));
        tokio::spawn(async move { axum::serve(listener, router).await });
        // Another test may have done so.
        _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let client = reqwest::Client::builder().no_proxy().tls_certs_only([]).build().unwrap();
        let words = words(client.get(&url).send().await.unwrap()).await;
        assert!(words.starts_with("sorry, no sorry,") && words.len() <= WORDS_MAX, "{words}");
        assert_eq!(read(client.get(&url).send().await.unwrap(), 100_000).await.unwrap().len(), 100_000);
        for (end, max, expected) in
            [("\n  n", 100, "sorry,\n  n"), ("o\nso", 100, "sorry,\n  no\nso"), ("?", 4, "sorr")]
        {
            let response = client.get(&url).send().await.unwrap();
            let body = read_until(response, end.as_bytes(), max).await.unwrap();
            assert_eq!(String::from_utf8(body).unwrap(), expected);
        }
    }
}

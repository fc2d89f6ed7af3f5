//! Parsers of kube-mgmt's flag formats.

use std::net::{Ipv4Addr, SocketAddr, ToSocketAddrs};

/// Parses a boolean like Go's `strconv.ParseBool`.
pub fn boolean(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("write true or false".to_owned()),
    }
}

/// Parses `HOST:PORT` like Go: an empty host means all addresses, names are resolved.
pub fn listen_address(text: &str) -> Result<SocketAddr, String> {
    if let Some(port) = text.strip_prefix(':') {
        let port = port.parse().map_err(|_| "write HOST:PORT or :PORT".to_owned())?;
        return Ok((Ipv4Addr::UNSPECIFIED, port).into());
    }
    let addresses = text.to_socket_addrs().map_err(|error| format!("{error}; write HOST:PORT or :PORT"))?;
    let mut addresses: Vec<_> = addresses.collect();
    // Go prefers IPv4.
    addresses.sort_by_key(|address| !address.is_ipv4());
    addresses.first().copied().ok_or_else(|| "the name has no address".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listen_address_accepts_go_forms() {
        for (text, expected) in [
            ("127.0.0.1:8000", Some("127.0.0.1:8000")),
            ("localhost:8000", Some("127.0.0.1:8000")),
            (":8000", Some("0.0.0.0:8000")),
            ("[::1]:1", Some("[::1]:1")),
            (":", None),
            (":x", None),
            ("8000", None),
            ("127.0.0.1", None),
            ("127.0.0.1:99999", None),
        ] {
            let found = listen_address(text);
            assert_eq!(
                found.clone().ok(),
                expected.map(|address| address.parse().unwrap()),
                "{text}: {found:?}"
            );
        }
    }

    #[test]
    fn boolean_accepts_go_spellings() {
        for (text, expected) in
            [("1", Some(true)), ("T", Some(true)), ("False", Some(false)), ("yes", None), ("", None)]
        {
            assert_eq!(boolean(text).ok(), expected, "{text}");
        }
    }
}

//! Certificates of authorities from a PEM file.

use std::path::Path;

use reqwest::Certificate;

/// Reads the certificates in `file`; the error names the file. A file without any is refused: a truncated or empty mount
/// would look like a server that nobody trusts.
pub fn authorities(file: &Path) -> Result<Vec<Certificate>, String> {
    let because = |cause: &dyn std::fmt::Display| format!("{}: {cause}", file.display());
    let pem = std::fs::read(file).map_err(|error| because(&error))?;
    let certificates = Certificate::from_pem_bundle(&pem).map_err(|error| because(&error))?;
    if certificates.is_empty() {
        return Err(because(&"the file has no certificate in PEM"));
    }
    Ok(certificates)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_certificates_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for text in ["", "no certificate\n", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
        {
            std::fs::write(file.path(), text).unwrap();
            let error = authorities(file.path()).unwrap_err();
            assert!(
                error.contains(&file.path().display().to_string()) && error.contains("no certificate"),
                "{error}"
            );
        }
        assert!(authorities(Path::new("/nowhere/ca.pem")).unwrap_err().starts_with("/nowhere/ca.pem: "));
    }
}

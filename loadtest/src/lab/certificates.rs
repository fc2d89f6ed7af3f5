//! Certificates for servers on loopback.

use std::fs;
use std::path::Path;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

/// Writes an authority `ca.crt`, and `<name>.crt` and `<name>.key` for `hosts`.
pub fn write(dir: &Path, name: &str, hosts: &[&str]) -> anyhow::Result<()> {
    let ca_key = KeyPair::generate()?;
    let mut params = CertificateParams::new(Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = params.self_signed(&ca_key)?;
    let issuer = Issuer::from_params(&params, &ca_key);
    let key = KeyPair::generate()?;
    let hosts: Vec<_> = hosts.iter().map(ToString::to_string).collect();
    let certificate = CertificateParams::new(hosts)?.signed_by(&key, &issuer)?;
    fs::write(dir.join("ca.crt"), ca.pem())?;
    fs::write(dir.join(format!("{name}.crt")), certificate.pem())?;
    Ok(fs::write(dir.join(format!("{name}.key")), key.serialize_pem())?)
}

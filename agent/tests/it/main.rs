//! Tests of the program.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::Command;

mod sessions;

fn run(args: &[&str]) -> (bool, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_opa-hub-agent")).args(args).env_clear().output().unwrap();
    (output.status.success(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
}

#[test]
fn invalid_arguments_are_explained() {
    for (args, part) in [
        (&[][..], "--hub"),
        (&["--hub", "unix:/x"], "write http://HOST"),
        (&["--hub", "http://127.0.0.1:1", "--bundle", "a/b"], "--bundle \"a/b\""),
        (&["--hub", "http://127.0.0.1:1", "--opa-ca-file", "/nowhere"], "/nowhere"),
        (
            &["--hub", "http://127.0.0.1:1", "--opa-ca-file", "/dev/null"],
            "/dev/null: the file has no certificate",
        ),
        (&["--hub", "https://127.0.0.1:1", "--hub-ca-file", "/nowhere"], "/nowhere"),
        (&["--hub", "https://127.0.0.1:1", "--hub-ca-file", "/dev/null"], "check --hub-ca-file"),
        (
            &["--hub", "http://127.0.0.1:1", "--opa-auth-token", "a", "--opa-auth-token-file", "b"],
            "cannot be used with",
        ),
    ] {
        let (success, output) = run(args);
        assert!(!success && output.contains(part), "{args:?}: {output}");
    }
}

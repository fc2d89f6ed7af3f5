//! The program: what it says of itself, and what it says when it cannot do what it was told.

use std::process::Command;

fn run(args: &[&str]) -> (bool, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_opa-hub")).args(args).env_clear().output().unwrap();
    (output.status.success(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
}

#[test]
fn says_what_is_wrong_and_what_to_do() {
    for (args, part) in [
        (&["--manifests", "/nowhere"][..], "cannot read the manifests folder /nowhere"),
        (&["--replicate", "pods"], "write [group/]version/plural"),
        (&["--kubeconfig", "/nowhere"], "cannot use kubeconfig /nowhere"),
        (&["--listen", "127.0.0.1:1", "--bundle", "a/b"], "--bundle \"a/b\""),
        (&[], "give --kubeconfig FILE or --manifests DIR"),
    ] {
        let (success, output) = run(args);
        assert!(!success && output.contains(part), "{args:?}: {output}");
    }
}

#[test]
fn helps() {
    let (success, output) = run(&["--help"]);
    assert!(success);
    for flag in
        ["--namespaces", "--policy-label", "--replicate-ignore-namespaces", "--enable-data", "--bundle"]
    {
        assert!(output.contains(flag), "{flag}");
    }
}

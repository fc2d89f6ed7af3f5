//! The hub program: help, errors and notices.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

fn run(args: &[&str]) -> (bool, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_opa-hub")).args(args).env_clear().output().unwrap();
    (output.status.success(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
}

#[test]
fn errors_name_cause_and_remedy() {
    for (args, part) in [
        (&["--manifests", "/nowhere"][..], "reading manifests folder /nowhere failed"),
        (&["--replicate", "pods"], "write [group/]version/plural"),
        (&["--kubeconfig", "/nowhere"], "reading kubeconfig /nowhere failed"),
        (&["--listen", "127.0.0.1:1", "--bundle", "a/b"], "--bundle \"a/b\""),
        (&[], "set --kubeconfig FILE or --manifests DIR"),
    ] {
        let (success, output) = run(args);
        assert!(!success && output.contains(part), "{args:?}: {output}");
    }
}

#[test]
fn help_lists_the_flags() {
    let (success, output) = run(&["--help"]);
    assert!(success);
    for flag in
        ["--namespaces", "--policy-label", "--replicate-ignore-namespaces", "--enable-data", "--bundle"]
    {
        assert!(output.contains(flag), "{flag}");
    }
}

/// A hub process, killed on drop.
struct RunningBundle(Child);

impl Drop for RunningBundle {
    fn drop(&mut self) {
        _ = self.0.kill();
        _ = self.0.wait();
    }
}

fn get(address: &str, path: &str) -> Vec<u8> {
    let mut tcp = TcpStream::connect(address).unwrap();
    write!(tcp, "GET {path} HTTP/1.1\r\nhost: hub\r\nprefer: wait=300\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    tcp.read_to_end(&mut answer).unwrap();
    let head = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n").unwrap();
    answer.split_off(head + 4)
}

/// Without an `opa`, the README's first command warns with a remedy and rejects nothing.
#[test]
fn hub_without_opa_warns_and_rejects_nothing() {
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/demo");
    let mut command = Command::new(env!("CARGO_BIN_EXE_opa-hub"));
    command.args(["--manifests", demo, "--listen", "127.0.0.1:0"]).env_clear().env("PATH", "/nowhere");
    let mut hub = RunningBundle(command.stderr(Stdio::piped()).spawn().unwrap());
    // The hub exits if its log is not read.
    let mut log = BufReader::new(hub.0.stderr.take().unwrap()).lines();
    let (mut address, mut is_ready, mut warnings) = (None, false, Vec::new());
    while address.is_none() || !is_ready {
        let line = log.next().unwrap().unwrap();
        if let Some((_, url)) = line.split_once("dashboard=http://") {
            address = Some(url.trim_end_matches('/').to_owned());
        }
        is_ready |= line.contains(": ready ");
        if line.contains("WARN") {
            warnings.push(line);
        }
    }
    let address = address.unwrap();
    let json = |path: &str| serde_json::from_slice::<Value>(&get(&address, path)).unwrap();
    assert!(warnings.iter().any(|line| line.contains("set OPA_BIN")), "{warnings:?}");
    // The log precedes the first snapshot.
    assert!(!get(&address, "/bundles/main").is_empty());
    let all = json("/v1/bundles");
    assert_eq!((&all["problems"], &all["bundles"][0]["problems"]), (&json!([]), &json!([])), "{all}");
    assert_eq!(all["notices"][0]["subject"], "opa", "{all}");
    assert!(all["notices"][0]["message"].as_str().unwrap().contains("set OPA_BIN"), "{all}");
    let bundle = json("/v1/bundles/main");
    assert_eq!(bundle["verdicts"]["shop/orders"]["status"], "ok", "{bundle}");
    let ready = json("/readyz");
    assert_eq!((&ready["ready"], &ready["problems"]), (&json!(true), &json!([])), "{ready}");
}

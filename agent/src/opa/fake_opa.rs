//! Fake OPA (OPA v1/server/server.go, v1/storage/inmem/txn.go).
//!
//! Lines of a module: `has x` is a rule, `calls x` needs a rule, `broken` does not parse, `odd` calls an unknown built-in
//! function. Errors have the locations of OPA 1.22: the first module of a conflict, the caller of a missing function.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use bytes::Bytes;
use opa_hub_proto::path::unescape;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::net::TcpListener;

use super::client::OpaClient;
use crate::config::OpaConfig;

pub(super) struct World {
    pub(super) data: Value,
    pub(super) modules: BTreeMap<String, String>,
    /// Requests as `METHOD path status`.
    pub(super) log: Vec<String>,
    pub(super) fails_after: Option<usize>,
}

#[derive(Clone)]
pub(super) struct FakeOpa(Arc<Mutex<World>>);

type Reply = (StatusCode, String);

impl FakeOpa {
    pub(super) async fn start() -> (Self, OpaClient) {
        let world = World { data: json!({}), modules: BTreeMap::new(), log: Vec::new(), fails_after: None };
        let fake = Self(Arc::new(Mutex::new(world)));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/v1/", listener.local_addr().unwrap()).parse().unwrap();
        let router =
            Router::new().fallback(answer).layer(DefaultBodyLimit::disable()).with_state(fake.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let opa =
            OpaClient::new(OpaConfig { url, token: None, ca_file: None, allow_insecure: false }).unwrap();
        (fake, opa)
    }

    pub(super) fn with<T>(&self, f: impl FnOnce(&mut World) -> T) -> T {
        f(&mut self.0.lock().unwrap())
    }

    pub(super) fn log(&self) -> Vec<String> {
        self.with(|world| std::mem::take(&mut world.log))
    }
}

async fn answer(
    State(fake): State<FakeOpa>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Reply {
    let path = uri.path().strip_prefix("/v1/").unwrap_or_default().to_owned();
    let if_none = headers.contains_key("if-none-match");
    fake.with(|world| {
        let (status, body) = match world.fails_after {
            Some(0) => (StatusCode::SERVICE_UNAVAILABLE, "not now".to_owned()),
            _ => world.answer(&method, &path, if_none, &body),
        };
        world.fails_after = world.fails_after.map(|left| left.saturating_sub(1));
        world.log.push(format!("{method} {path} {}", status.as_u16()));
        (status, body)
    })
}

impl World {
    fn answer(&mut self, method: &Method, path: &str, if_none: bool, body: &[u8]) -> Reply {
        let text = || String::from_utf8(body.to_vec()).unwrap();
        let (api, rest) = path.split_once('/').unwrap_or((path, ""));
        match (method.as_str(), api) {
            ("PATCH", "data") => self.patch(body),
            ("PUT", "data") => self.put(rest, if_none, serde_json::from_slice(body).unwrap()),
            ("GET", "data") => {
                let value = self.data.pointer(&format!("/{rest}"));
                ok(value.map_or(json!({}), |value| json!({ "result": value })).to_string())
            }
            ("POST", "query") => {
                let keys = self.data.pointer(&pointer(&text())).and_then(Value::as_object);
                let bindings = keys.map(|map| json!({ "keys": map.keys().collect::<Vec<_>>() }));
                ok(json!({ "result": bindings.into_iter().collect::<Vec<_>>() }).to_string())
            }
            ("POST", "compile") => {
                let query: Value = serde_json::from_slice(body).unwrap();
                let query = query["query"].as_str().unwrap();
                let (marker, revision) = query.split_once(".revision == ").unzip();
                let found = self.data.pointer(&pointer(marker.unwrap_or(query)));
                let is_true = found.is_some_and(|found| {
                    let is_equal = |revision: &str| {
                        serde_json::from_str(revision).is_ok_and(|value: Value| found["revision"] == value)
                    };
                    revision.is_none_or(is_equal)
                });
                let queries = if is_true { json!([[]]) } else { json!([]) };
                ok(json!({ "result": { "queries": queries } }).to_string())
            }
            ("GET", "policies") => match self.modules.get(rest) {
                Some(raw) => ok(format!(r#"{{"result":{{"id":"{rest}","raw":{},"ast":{{}}}}}}"#, json!(raw))),
                None => not_found(),
            },
            ("PUT", "policies") => {
                let mut modules = self.modules.clone();
                modules.insert(rest.to_owned(), text());
                self.compile(modules)
            }
            ("DELETE", "policies") => {
                let mut modules = self.modules.clone();
                match modules.remove(rest) {
                    Some(_) => self.compile(modules),
                    None => not_found(),
                }
            }
            _ => panic!("OPA has no {method} {path}"),
        }
    }

    fn patch(&mut self, body: &[u8]) -> Reply {
        #[derive(Deserialize)]
        struct Op {
            #[serde(rename = "op")]
            name: String,
            path: String,
            #[serde(default)]
            value: Value,
        }
        let mut data = self.data.clone();
        for Op { name, path, value } in serde_json::from_slice::<Vec<Op>>(body).unwrap() {
            let tokens = tokens(&path);
            let Some((map, key)) = parent(&mut data, &tokens) else { return not_found() };
            match name.as_str() {
                "add" => _ = map.insert(key.clone(), value),
                "replace" if map.contains_key(key) => _ = map.insert(key.clone(), value),
                "remove" if map.contains_key(key) => _ = map.remove(key),
                _ => return not_found(),
            }
        }
        self.data = data;
        (StatusCode::NO_CONTENT, String::new())
    }

    fn put(&mut self, path: &str, if_none: bool, value: Value) -> Reply {
        let tokens = tokens(path);
        if if_none && self.data.pointer(&format!("/{path}")).is_some() {
            return (StatusCode::NOT_MODIFIED, String::new());
        }
        for end in 1..tokens.len() {
            let Some((map, key)) = parent(&mut self.data, &tokens[..end]) else { return not_found() };
            map.entry(key.clone()).or_insert_with(|| json!({}));
        }
        let Some((map, key)) = parent(&mut self.data, &tokens) else { return not_found() };
        map.insert(key.clone(), value);
        (StatusCode::NO_CONTENT, String::new())
    }

    fn compile(&mut self, modules: BTreeMap<String, String>) -> Reply {
        let coded = |code: &str, message: String, file: &str| json!({ "code": code, "message": message, "location": { "file": file, "row": 1, "col": 1 } });
        let error = |message: String, file: &str| coded("rego_type_error", message, file);
        let mut rules: BTreeMap<&str, &str> = BTreeMap::new();
        let mut errors = Vec::new();
        let lines =
            || modules.iter().flat_map(|(id, text)| text.lines().map(move |line| (id.as_str(), line)));
        for (id, line) in lines() {
            let Some(rule) = line.strip_prefix("has ") else { continue };
            match rules.get(rule) {
                Some(first) => errors.push(error(format!("conflicting rules data.{rule} found"), first)),
                None => _ = rules.insert(rule, id),
            }
        }
        for (id, _) in lines().filter(|(_, line)| *line == "broken") {
            errors.push(coded("rego_parse_error", "unexpected eof token".to_owned(), id));
        }
        // OPA stops at the first failed stage.
        let has_conflicts = !errors.is_empty();
        for (id, line) in lines().filter(|_| !has_conflicts) {
            match line.strip_prefix("calls ") {
                Some(rule) if !rules.contains_key(rule) => {
                    errors.push(error(format!("undefined function {rule}"), id));
                }
                None if line == "odd" => errors.push(error("undefined function odd".to_owned(), id)),
                _ => {}
            }
        }
        if errors.is_empty() {
            self.modules = modules;
            return ok("{}".to_owned());
        }
        let message = "error(s) occurred while compiling module(s)";
        let refusal = json!({ "code": "invalid_parameter", "message": message, "errors": errors });
        (StatusCode::BAD_REQUEST, format!("{refusal:#}"))
    }
}

fn ok(body: String) -> Reply {
    (StatusCode::OK, body)
}

fn not_found() -> Reply {
    let message = "storage_not_found_error: document does not exist";
    (StatusCode::NOT_FOUND, json!({ "code": "resource_not_found", "message": message }).to_string())
}

fn tokens(path: &str) -> Vec<String> {
    path.trim_matches('/').split('/').map(|token| unescape(token).into_owned()).collect()
}

/// Returns the map with the last token.
fn parent<'a>(data: &'a mut Value, tokens: &'a [String]) -> Option<(&'a mut Map<String, Value>, &'a String)> {
    let (last, dirs) = tokens.split_last()?;
    let mut map = data;
    for token in dirs {
        map = map.as_object_mut()?.get_mut(token)?;
    }
    Some((map.as_object_mut()?, last))
}

fn pointer(query: &str) -> String {
    let query = query.replace('\\', "");
    let (_, names) = query.split_once("data[").unwrap();
    names
        .split(['"', '[', ']', ')', '}', ' '])
        .filter(|name| !name.is_empty())
        .fold(String::new(), |path, name| path + "/" + name)
}

//! OPA's intermediate representation (OPA v1/ir/ir.go), free of aliases, imports, unification and
//! comprehensions.
//!
//! Definitions of one rule reuse numbers for different locals: a first mention that assigns starts a new local.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::{Map, Value};

/// Output of `opa build -t plan`.
#[derive(Deserialize)]
pub(crate) struct Plan {
    #[serde(rename = "static")]
    tables: Tables,
    plans: Plans,
    #[serde(default)]
    funcs: Funcs,
}

#[derive(Deserialize)]
struct Tables {
    #[serde(default)]
    strings: Vec<Text>,
    #[serde(default)]
    files: Vec<Text>,
}

#[derive(Deserialize)]
struct Text {
    value: String,
}

#[derive(Deserialize)]
struct Plans {
    plans: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    #[serde(default)]
    name: String,
    blocks: Vec<Block>,
}

#[derive(Deserialize, Default)]
struct Funcs {
    funcs: Option<Vec<Function>>,
}

/// A rule or function. Parameters 0 and 1 are `input` and `data`.
#[derive(Deserialize)]
pub(crate) struct Function {
    pub name: String,
    pub params: Vec<u32>,
    pub blocks: Vec<Block>,
}

/// Statements that run until one is undefined.
#[derive(Deserialize, Default)]
pub(crate) struct Block {
    #[serde(default)]
    pub stmts: Vec<Stmt>,
}

#[derive(Deserialize)]
#[serde(try_from = "TaggedStmt")]
pub(crate) struct Stmt {
    /// Kind, e.g. `DotStmt`.
    pub kind: String,
    /// Nested blocks, from `block` or `blocks`.
    pub blocks: Vec<Block>,
    members: Map<String, Value>,
}

#[derive(Deserialize)]
struct TaggedStmt {
    #[serde(rename = "type")]
    kind: String,
    stmt: Map<String, Value>,
}

impl TryFrom<TaggedStmt> for Stmt {
    type Error = serde_json::Error;

    fn try_from(TaggedStmt { kind, stmt: mut members }: TaggedStmt) -> Result<Self, Self::Error> {
        let single = members.remove("block").map(Block::deserialize);
        let list = members.remove("blocks").map(Option::<Vec<Block>>::deserialize).transpose()?.flatten();
        let blocks =
            single.into_iter().chain(list.into_iter().flatten().map(Ok)).collect::<Result<_, _>>()?;
        Ok(Self { kind, blocks, members })
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Operand<'a> {
    Local(u32),
    Text(&'a str),
    Bool(bool),
}

/// Source location of a statement.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Site {
    /// Module id.
    pub file: String,
    /// Row, from 1.
    pub row: u64,
    /// Column, from 1.
    pub col: u64,
}

impl std::fmt::Display for Site {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}:{}", self.file, self.row, self.col)
    }
}

impl Plan {
    /// Returns each entrypoint's blocks. Locals 0 and 1 are `input` and `data`.
    pub(crate) fn entries(&self) -> impl Iterator<Item = &Vec<Block>> {
        self.plans.plans.iter().map(|entry| &entry.blocks)
    }

    /// Returns names such as `kubernetes/admission/deny`.
    pub(crate) fn entrypoints(&self) -> impl Iterator<Item = &str> {
        self.plans.plans.iter().map(|entry| entry.name.as_str())
    }

    /// Renames source files. Statements of files without a new name lose their location.
    pub(crate) fn rename_files(&mut self, name: impl Fn(&str) -> Option<String>) {
        for file in &mut self.tables.files {
            file.value = name(&file.value).unwrap_or_default();
        }
    }

    pub(crate) fn functions(&self) -> HashMap<&str, &Function> {
        self.funcs.funcs.iter().flatten().map(|function| (function.name.as_str(), function)).collect()
    }

    pub(crate) fn operand<'a>(&'a self, stmt: &'a Stmt, name: &str) -> Option<Operand<'a>> {
        self.parse_operand(stmt.members.get(name)?)
    }

    pub(crate) fn operands<'a>(&'a self, stmt: &'a Stmt, name: &str) -> Vec<Operand<'a>> {
        let list = stmt.members.get(name).and_then(Value::as_array);
        list.into_iter().flatten().filter_map(|value| self.parse_operand(value)).collect()
    }

    fn parse_operand<'a>(&'a self, value: &'a Value) -> Option<Operand<'a>> {
        if let Some(local) = value.as_u64() {
            return u32::try_from(local).ok().map(Operand::Local);
        }
        let constant = value.get("value")?;
        let number = || u32::try_from(constant.as_u64()?).ok();
        match value.get("type")?.as_str()? {
            "local" => Some(Operand::Local(number()?)),
            "string_index" => Some(Operand::Text(&self.tables.strings.get(number()? as usize)?.value)),
            "bool" => Some(Operand::Bool(constant.as_bool()?)),
            _ => None,
        }
    }

    /// Returns the locals that a statement reads or extends.
    pub(crate) fn uses(&self, stmt: &Stmt) -> Vec<u32> {
        let names: &[&str] = match stmt.kind.as_str() {
            "AssignIntStmt" | "MakeNumberIntStmt" => &[],
            "ScanStmt" => &["source"],
            // An earlier assignment is preserved.
            "AssignVarOnceStmt" => &["source", "target"],
            _ => &["source", "key", "value", "a", "b", "array", "set", "object", "local"],
        };
        let operands = names.iter().filter_map(|name| self.operand(stmt, name));
        let operands = operands.chain(self.operands(stmt, "args")).chain(self.operands(stmt, "path"));
        let locals = operands.filter_map(|operand| match operand {
            Operand::Local(local) => Some(local),
            _ => None,
        });
        locals.collect()
    }

    /// `None` for generated code.
    pub(crate) fn site(&self, stmt: &Stmt) -> Option<Site> {
        let number = |name: &str| stmt.members.get(name).and_then(Value::as_u64);
        let row = number("row").filter(|row| *row > 0)?;
        let file = self.tables.files.get(usize::try_from(number("file")?).ok()?)?;
        if file.value.is_empty() {
            return None;
        }
        Some(Site { file: file.value.clone(), row, col: number("col").unwrap_or_default() })
    }
}

impl Stmt {
    pub(crate) fn local(&self, name: &str) -> Option<u32> {
        u32::try_from(self.members.get(name)?.as_u64()?).ok()
    }

    /// Whether a `with` replaces only part of the local.
    pub(crate) fn has_path(&self) -> bool {
        self.members.get("path").and_then(Value::as_array).is_some_and(|path| !path.is_empty())
    }

    pub(crate) fn targets(&self) -> Vec<u32> {
        let names: &[&str] = match self.kind.as_str() {
            "ScanStmt" => &["key", "value"],
            "AssignVarOnceStmt" => &[],
            _ => &["target", "result"],
        };
        names.iter().filter_map(|name| self.local(name)).collect()
    }

    pub(crate) fn text(&self, name: &str) -> Option<&str> {
        self.members.get(name)?.as_str()
    }
}

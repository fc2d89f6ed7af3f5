//! Writes the JSON patch (RFC 6902) that an OPA's `PATCH /v1/data` takes.

use crate::path::{DirPath, escape};

/// Operations that OPA is given in one PATCH at most: its cost grows with the square of their number
/// (500: 15 ms; 2,000: 195 ms; 10,000: 4.4 s).
pub const PATCH_OPS_MAX: usize = 500;

/// A JSON patch under construction: operations separated by commas, without the brackets around them, so that
/// two patches are spliced by a comma.
#[derive(Default)]
pub struct PatchWriter {
    text: Vec<u8>,
    ops: usize,
}

impl PatchWriter {
    /// Adds or replaces one entry of `dir`. `value` is JSON.
    pub fn add(&mut self, dir: &DirPath, key: &str, value: &[u8]) {
        self.op("add", dir, Some(key));
        self.value(value);
    }

    /// Adds or replaces a whole directory. `value` is a JSON object.
    pub fn add_dir(&mut self, dir: &DirPath, value: &[u8]) {
        self.op("add", dir, None);
        self.value(value);
    }

    /// Removes one entry of `dir`, which must exist.
    pub fn remove(&mut self, dir: &DirPath, key: &str) {
        self.op("remove", dir, Some(key));
        self.text.push(b'}');
    }

    /// Removes a whole directory, which must exist.
    pub fn remove_dir(&mut self, dir: &DirPath) {
        self.op("remove", dir, None);
        self.text.push(b'}');
    }

    /// Adds or replaces (`Some`) a member of one entry of `dir`, or removes it. `below` leads from the entry to the member,
    /// escaped, with a leading slash.
    pub fn member(&mut self, dir: &DirPath, key: &str, below: &str, value: Option<&[u8]>) {
        let op = if value.is_some() { "add" } else { "remove" };
        self.begin(op, &format!("{dir}/{}{below}", escape(key)));
        match value {
            Some(value) => self.value(value),
            None => self.text.push(b'}'),
        }
    }

    /// Replaces one entry of `dir`, which must exist.
    pub fn replace(&mut self, dir: &DirPath, key: &str, value: &[u8]) {
        self.op("replace", dir, Some(key));
        self.value(value);
    }

    /// Appends operations that are already written: `ops` of them, with no brackets around.
    pub fn splice(&mut self, written: &[u8], ops: usize) {
        if !written.is_empty() {
            self.comma();
            self.text.extend_from_slice(written);
            self.ops += ops;
        }
    }

    /// How many operations were written.
    pub fn ops(&self) -> usize {
        self.ops
    }

    /// Bytes written so far.
    pub fn len(&self) -> usize {
        self.text.len()
    }

    /// Whether nothing was written.
    pub fn is_empty(&self) -> bool {
        self.text.is_empty()
    }

    /// The patch as a JSON array.
    pub fn into_array(self) -> Vec<u8> {
        self.into_array_after(&Self::default())
    }

    /// The patch as a JSON array, behind the operations of `first`.
    pub fn into_array_after(self, first: &Self) -> Vec<u8> {
        let mut array = Vec::with_capacity(first.text.len() + self.text.len() + 3);
        array.push(b'[');
        array.extend_from_slice(&first.text);
        if !first.is_empty() && !self.is_empty() {
            array.push(b',');
        }
        array.extend_from_slice(&self.text);
        array.push(b']');
        array
    }

    fn comma(&mut self) {
        if !self.text.is_empty() {
            self.text.push(b',');
        }
    }

    fn op(&mut self, op: &str, dir: &DirPath, key: Option<&str>) {
        match key {
            None => self.begin(op, dir.as_str()),
            Some(key) => self.begin(op, &format!("{dir}/{}", escape(key))),
        }
    }

    fn begin(&mut self, op: &str, path: &str) {
        self.comma();
        self.ops += 1;
        self.text.extend_from_slice(b"{\"op\":\"");
        self.text.extend_from_slice(op.as_bytes());
        self.text.extend_from_slice(b"\",\"path\":");
        push_json_string(&mut self.text, path);
    }

    fn value(&mut self, value: &[u8]) {
        self.text.extend_from_slice(b",\"value\":");
        self.text.extend_from_slice(value);
        self.text.push(b'}');
    }
}

/// Appends `text` as a JSON string.
pub fn push_json_string(out: &mut Vec<u8>, text: &str) {
    serde_json::to_writer(out, text).expect("a string always serializes into memory");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_what_opa_reads() {
        let dir: DirPath = "/a/b".parse().unwrap();
        let mut patch = PatchWriter::default();
        patch.add_dir(&dir, b"{}");
        patch.add(&dir, "k/\"1\"", b"{\"x\":1.50}");
        patch.remove(&dir, "50%");
        patch.splice(br#"{"op":"remove","path":"/x"}"#, 1);
        patch.splice(b"", 0);
        patch.replace(&dir, "k", b"1");
        patch.remove_dir(&dir);
        assert_eq!(patch.ops(), 6);
        assert_eq!(
            String::from_utf8(patch.into_array()).unwrap(),
            concat!(
                r#"[{"op":"add","path":"/a/b","value":{}},"#,
                r#"{"op":"add","path":"/a/b/k~1\"1\"","value":{"x":1.50}},"#,
                r#"{"op":"remove","path":"/a/b/50%25"},"#,
                r#"{"op":"remove","path":"/x"},"#,
                r#"{"op":"replace","path":"/a/b/k","value":1},"#,
                r#"{"op":"remove","path":"/a/b"}]"#,
            )
        );
        let patch = |paths: &[&str]| {
            let mut patch = PatchWriter::default();
            for path in paths {
                patch.remove_dir(&path.parse().unwrap());
            }
            patch
        };
        for (first, second) in [(&["/a"][..], &["/b", "/c"][..]), (&[], &["/b"]), (&["/a"], &[]), (&[], &[])]
        {
            let both = patch(second).into_array_after(&patch(first));
            assert_eq!(both, patch(&[first, second].concat()).into_array());
        }
    }
}

//! Writes GGUF files.

use std::io::{self, Write};

use super::{GgmlType, Kind, Value};
use crate::dtype::DType;

/// Alignment of the files written.
pub const ALIGNMENT: u64 = 32;

/// A GGUF file (version 3) put together in memory and then written: metadata and tensors in the order in which they are added.
#[derive(Clone, Debug, Default)]
pub struct Writer {
    metadata: Vec<(String, Value)>,
    tensors: Vec<(String, Vec<usize>, DType, Vec<u8>)>,
}

impl Writer {
    /// An empty file.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a metadata entry. Arrays must hold their values.
    pub fn metadata(&mut self, key: &str, value: Value) -> &mut Self {
        self.metadata.push((key.to_owned(), value));
        self
    }

    /// Adds an array of `values`, all of them of type `kind`.
    pub fn array(&mut self, key: &str, kind: Kind, values: Vec<Value>) -> &mut Self {
        let array = super::Array { kind, len: values.len() as u64, values: Some(values) };
        self.metadata(key, Value::Array(Box::new(array)))
    }

    /// Adds a tensor of row-major `shape` (`[out, in]` for a matrix) whose encoded values are `data`.
    pub fn tensor(&mut self, name: &str, shape: &[usize], dtype: DType, data: Vec<u8>) -> &mut Self {
        self.tensors.push((name.to_owned(), shape.to_vec(), dtype, data));
        self
    }

    /// Everything before the tensors' data, which follows in order, each tensor padded to 32 bytes: for files too large to be put together in
    /// memory, whose tensors were added without data.
    ///
    /// # Errors
    /// When a tensor's rows are not whole blocks.
    pub fn header(&self) -> io::Result<Vec<u8>> {
        let mut header = Vec::new();
        header.extend_from_slice(b"GGUF");
        header.extend_from_slice(&3u32.to_le_bytes());
        header.extend_from_slice(&(self.tensors.len() as u64).to_le_bytes());
        header.extend_from_slice(&(self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            put_text(&mut header, key);
            header.extend_from_slice(&(value.kind() as u32).to_le_bytes());
            put_value(&mut header, value)?;
        }
        let mut offset = 0u64;
        for (name, shape, dtype, _) in &self.tensors {
            let bytes = tensor_bytes(name, shape, *dtype)?;
            put_text(&mut header, name);
            header.extend_from_slice(&(shape.len() as u32).to_le_bytes());
            for &extent in shape.iter().rev() {
                header.extend_from_slice(&(extent as u64).to_le_bytes());
            }
            header.extend_from_slice(&GgmlType::id_of(*dtype).to_le_bytes());
            header.extend_from_slice(&offset.to_le_bytes());
            offset = (offset + bytes as u64).next_multiple_of(ALIGNMENT);
        }
        pad(&mut header);
        Ok(header)
    }

    /// Writes the file.
    ///
    /// # Errors
    /// When `out` fails, or when a tensor's data does not have the length of its shape and type.
    pub fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        for (name, shape, dtype, data) in &self.tensors {
            let expected = tensor_bytes(name, shape, *dtype)?;
            if expected != data.len() {
                let message = format!("tensor {name} of shape {shape:?} and type {dtype:?} has {} bytes, expected {expected}", data.len());
                return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
            }
        }
        out.write_all(&self.header()?)?;
        for (_, _, _, data) in &self.tensors {
            out.write_all(data)?;
            let end = data.len() as u64;
            out.write_all(&[0; ALIGNMENT as usize][..(end.next_multiple_of(ALIGNMENT) - end) as usize])?;
        }
        Ok(())
    }

    /// The file's bytes.
    ///
    /// # Errors
    /// When a tensor's data does not have the length of its shape and type.
    pub fn to_bytes(&self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.write(&mut bytes)?;
        Ok(bytes)
    }
}

/// Bytes of a tensor's data.
fn tensor_bytes(name: &str, shape: &[usize], dtype: DType) -> io::Result<usize> {
    let rows = shape.iter().rev().skip(1).try_fold(1_usize, |n, &extent| n.checked_mul(extent));
    let bytes = shape.last().and_then(|&k| dtype.row_bytes(k)).zip(rows).and_then(|(row, rows)| row.checked_mul(rows));
    bytes.ok_or_else(|| {
        let message = format!("rows of tensor {name} of shape {shape:?} are not whole blocks of {dtype:?}");
        io::Error::new(io::ErrorKind::InvalidInput, message)
    })
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize((bytes.len() as u64).next_multiple_of(ALIGNMENT) as usize, 0);
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) -> io::Result<()> {
    match value {
        Value::U8(v) => out.push(*v),
        Value::I8(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::U16(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::I16(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::U32(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::I32(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::F32(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::U64(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::I64(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::F64(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::Bool(v) => out.push((*v).into()),
        Value::String(v) => put_text(out, v),
        Value::Array(array) => {
            let values = array.values.as_deref().unwrap_or_default();
            if values.len() as u64 != array.len || values.iter().any(|v| v.kind() != array.kind) || array.kind == Kind::Array {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "an array's values differ from its type or length"));
            }
            out.extend_from_slice(&(array.kind as u32).to_le_bytes());
            out.extend_from_slice(&array.len.to_le_bytes());
            for value in values {
                put_value(out, value)?;
            }
        }
    }
    Ok(())
}

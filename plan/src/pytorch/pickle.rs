//! The pickle of a state dict, read as data: a closed list of opcodes and of names that may be called, each with one fixed meaning here.
//!
//! Nothing is imported, looked up or executed. Values refer to each other by number, so that neither depth nor cycles cost anything; what is
//! held is a few times the pickle.

use super::{Problem, PytorchError};

/// A value on the stack.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Value<'a> {
    Mark,
    None,
    Bool(bool),
    Int(i64),
    /// A number, or bytes, of which nothing is read.
    Opaque,
    Text(&'a str),
    /// Of [`Pickle::nodes`].
    Node(usize),
    Global(Global),
    /// Of [`Pickle::storages`].
    Storage(usize),
    /// Of [`Pickle::tensors`].
    Tensor(usize),
}

/// A container.
#[derive(Clone, Debug)]
pub(super) enum Node<'a> {
    Tuple(Vec<Value<'a>>),
    List(Vec<Value<'a>>),
    /// With the byte of the pickle at which each entry was set.
    Dict(Vec<(Value<'a>, Value<'a>, usize)>),
}

/// What may be named.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Global {
    OrderedDict,
    /// `_rebuild_tensor_v2`.
    Tensor,
    /// `_rebuild_parameter`.
    Parameter,
    /// A storage class: its element type and size.
    Storage(&'static str, u64),
}

/// The closed list: module, name, meaning.
const GLOBALS: [(&str, &str, Global); 13] = [
    ("collections", "OrderedDict", Global::OrderedDict),
    ("torch._utils", "_rebuild_tensor_v2", Global::Tensor),
    ("torch._utils", "_rebuild_parameter", Global::Parameter),
    ("torch", "FloatStorage", Global::Storage("F32", 4)),
    ("torch", "HalfStorage", Global::Storage("F16", 2)),
    ("torch", "BFloat16Storage", Global::Storage("BF16", 2)),
    ("torch", "DoubleStorage", Global::Storage("F64", 8)),
    ("torch", "LongStorage", Global::Storage("I64", 8)),
    ("torch", "IntStorage", Global::Storage("I32", 4)),
    ("torch", "ShortStorage", Global::Storage("I16", 2)),
    ("torch", "CharStorage", Global::Storage("I8", 1)),
    ("torch", "ByteStorage", Global::Storage("U8", 1)),
    ("torch", "BoolStorage", Global::Storage("BOOL", 1)),
];

/// A storage: an entry `data/<key>` of the archive.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Storage<'a> {
    pub(super) dtype: &'static str,
    pub(super) element: u64,
    pub(super) key: &'a str,
    pub(super) elements: u64,
}

/// A view of a storage.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Tensor {
    pub(super) storage: usize,
    /// First element.
    pub(super) first: u64,
    pub(super) shape: Vec<u64>,
    pub(super) strides: Vec<u64>,
}

/// A pickle, read.
#[derive(Debug)]
pub(super) struct Pickle<'a> {
    pub(super) nodes: Vec<Node<'a>>,
    pub(super) storages: Vec<Storage<'a>>,
    pub(super) tensors: Vec<Tensor>,
    pub(super) root: Value<'a>,
}

/// Reads the pickle `bytes`, which begins at byte `base` of the file.
pub(super) fn read(bytes: &[u8], base: u64) -> Result<Pickle<'_>, PytorchError> {
    let pickle = Pickle { nodes: Vec::new(), storages: Vec::new(), tensors: Vec::new(), root: Value::None };
    let mut machine = Machine { bytes, at: 0, op: 0, base, stack: Vec::new(), memo: Vec::new(), pickle };
    while machine.step()? {
        machine.check_size()?;
    }
    machine.pickle.root = machine.pop()?;
    Ok(machine.pickle)
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Where the present opcode stands.
    op: usize,
    base: u64,
    stack: Vec<Value<'a>>,
    memo: Vec<Option<Value<'a>>>,
    pickle: Pickle<'a>,
}

type Result_<T> = Result<T, PytorchError>;

impl<'a> Machine<'a> {
    fn fail(&self, problem: Problem) -> PytorchError {
        PytorchError::new("data.pkl", self.base + self.op as u64, problem)
    }

    fn wrong<T>(&self, expected: &str, got: impl Into<String>) -> Result_<T> {
        Err(self.fail(Problem::Invalid { expected: expected.to_owned(), got: got.into() }))
    }

    fn take(&mut self, n: usize) -> Result_<&'a [u8]> {
        let bytes = self.at.checked_add(n).and_then(|end| self.bytes.get(self.at..end)).ok_or_else(|| self.fail(Problem::Truncated))?;
        self.at += n;
        Ok(bytes)
    }

    fn number(&mut self, bytes: usize) -> Result_<u64> {
        let mut all = [0; 8];
        all[..bytes].copy_from_slice(self.take(bytes)?);
        Ok(u64::from_le_bytes(all))
    }

    /// Bytes whose length stands before them.
    fn counted(&mut self, width: usize) -> Result_<&'a [u8]> {
        let len = self.number(width)?;
        let len = usize::try_from(len).map_err(|_| self.fail(Problem::Truncated))?;
        self.take(len)
    }

    fn text(&mut self, width: usize) -> Result_<Value<'a>> {
        let text = self.counted(width)?;
        std::str::from_utf8(text).map(Value::Text).map_err(|_| self.fail(Problem::Utf8))
    }

    fn line(&mut self) -> Result_<&'a str> {
        let rest = &self.bytes[self.at..];
        let end = rest.iter().take(256).position(|&b| b == b'\n').ok_or_else(|| self.fail(Problem::Truncated))?;
        self.at += end + 1;
        std::str::from_utf8(&rest[..end]).map_err(|_| self.fail(Problem::Utf8))
    }

    fn push(&mut self, value: Value<'a>) {
        self.stack.push(value);
    }

    fn node(&mut self, node: Node<'a>) {
        self.push(Value::Node(self.pickle.nodes.len()));
        self.pickle.nodes.push(node);
    }

    fn pop(&mut self) -> Result_<Value<'a>> {
        match self.stack.pop() {
            None | Some(Value::Mark) => self.wrong("a value on the stack", "none"),
            Some(value) => Ok(value),
        }
    }

    /// The values above the last mark.
    fn marked(&mut self) -> Result_<Vec<Value<'a>>> {
        let Some(mark) = self.stack.iter().rposition(|v| *v == Value::Mark) else { return self.wrong("a mark on the stack", "none") };
        let values = self.stack.split_off(mark + 1);
        self.stack.pop();
        Ok(values)
    }

    fn tuple(&mut self, n: usize) -> Result_<()> {
        let mut values = Vec::with_capacity(n);
        for _ in 0..n {
            values.push(self.pop()?);
        }
        values.reverse();
        self.node(Node::Tuple(values));
        Ok(())
    }

    fn remember(&mut self, index: u64) -> Result_<()> {
        // A writer numbers what it remembers from 0 on, with at least two bytes for each.
        let Some(index) = usize::try_from(index).ok().filter(|&i| i <= self.bytes.len() / 2) else {
            return self.wrong("a number of a remembered value that is in order", index.to_string());
        };
        let Some(&value) = self.stack.last().filter(|v| **v != Value::Mark) else { return self.wrong("a value on the stack", "none") };
        if self.memo.len() <= index {
            self.memo.resize(index + 1, None);
        }
        self.memo[index] = Some(value);
        Ok(())
    }

    fn recall(&mut self, index: u64) -> Result_<()> {
        match usize::try_from(index).ok().and_then(|i| self.memo.get(i).copied().flatten()) {
            Some(value) => self.push(value),
            None => return self.wrong("the number of a remembered value", index.to_string()),
        }
        Ok(())
    }

    /// Runs one opcode; `false` at the end.
    fn step(&mut self) -> Result_<bool> {
        self.op = self.at;
        let op = self.take(1)?[0];
        match op {
            0x80 => match self.number(1)? {
                2..=5 => {}
                got => return self.wrong("pickle protocol 2 to 5", got.to_string()),
            },
            0x95 => drop(self.take(8)?),
            b'.' => return Ok(false),
            b'(' => self.push(Value::Mark),
            b'N' => self.push(Value::None),
            0x88 => self.push(Value::Bool(true)),
            0x89 => self.push(Value::Bool(false)),
            b'J' => {
                let bits = self.number(4)? as u32;
                self.push(Value::Int(bits.cast_signed().into()));
            }
            b'K' => {
                let value = self.number(1)?;
                self.push(Value::Int(value as i64));
            }
            b'M' => {
                let value = self.number(2)?;
                self.push(Value::Int(value as i64));
            }
            0x8a => self.long()?,
            b'G' => {
                self.take(8)?;
                self.push(Value::Opaque);
            }
            b'X' | 0x8c | 0x8d | b'U' | b'T' => {
                let width = match op {
                    b'X' | b'T' => 4,
                    0x8d => 8,
                    _ => 1,
                };
                let text = self.text(width)?;
                self.push(text);
            }
            b'B' | b'C' | 0x8e => {
                self.counted(match op {
                    b'B' => 4,
                    b'C' => 1,
                    _ => 8,
                })?;
                self.push(Value::Opaque);
            }
            _ => self.container(op)?,
        }
        Ok(true)
    }

    /// Refuses what makes far more of its bytes than a state dict does: six containers of a tensor, which takes over sixty.
    fn check_size(&self) -> Result_<()> {
        const SMALL: usize = 1024;
        let (containers, values) = (self.pickle.nodes.len(), self.stack.len());
        if containers > self.bytes.len() / 4 + SMALL || values > self.bytes.len() / 2 + SMALL {
            let got = format!("{containers} containers and a stack of {values} in {} bytes", self.bytes.len());
            return self.wrong("a state dict", got);
        }
        Ok(())
    }

    /// The opcodes of containers, remembered values, names and calls.
    fn container(&mut self, op: u8) -> Result_<()> {
        match op {
            b'}' => self.node(Node::Dict(Vec::new())),
            b']' => self.node(Node::List(Vec::new())),
            b')' => self.node(Node::Tuple(Vec::new())),
            b't' => {
                let values = self.marked()?;
                self.node(Node::Tuple(values));
            }
            0x85..=0x87 => self.tuple(usize::from(op - 0x84))?,
            b'q' | b'r' => {
                let index = self.number(if op == b'q' { 1 } else { 4 })?;
                self.remember(index)?;
            }
            0x94 => self.remember(self.memo.len() as u64)?,
            b'h' | b'j' => {
                let index = self.number(if op == b'h' { 1 } else { 4 })?;
                self.recall(index)?;
            }
            b'a' => {
                let value = self.pop()?;
                self.append(&[value])?;
            }
            b'e' => {
                let values = self.marked()?;
                self.append(&values)?;
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set(&[key, value])?;
            }
            b'u' => {
                let values = self.marked()?;
                self.set(&values)?;
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.global(module, name)?;
            }
            0x93 => match (self.pop()?, self.pop()?) {
                (Value::Text(name), Value::Text(module)) => self.global(module, name)?,
                _ => return self.wrong("a module and a name", "something else"),
            },
            b'Q' => self.persistent()?,
            b'R' => self.call()?,
            b'b' => self.build()?,
            _ => return Err(self.fail(Problem::Opcode { got: op })),
        }
        Ok(())
    }

    fn long(&mut self) -> Result_<()> {
        let bytes = self.counted(1)?;
        if bytes.len() > 8 {
            return self.wrong("an integer of at most 8 bytes", format!("{} bytes", bytes.len()));
        }
        let fill = if bytes.last().is_some_and(|b| b & 0x80 != 0) { 0xff } else { 0 };
        let mut all = [fill; 8];
        all[..bytes.len()].copy_from_slice(bytes);
        self.push(Value::Int(i64::from_le_bytes(all)));
        Ok(())
    }

    fn append(&mut self, values: &[Value<'a>]) -> Result_<()> {
        match self.stack.last() {
            Some(Value::Node(n)) => match &mut self.pickle.nodes[*n] {
                Node::List(list) => list.extend_from_slice(values),
                _ => return self.wrong("a list", "another container"),
            },
            _ => return self.wrong("a list", "another value"),
        }
        Ok(())
    }

    fn set(&mut self, values: &[Value<'a>]) -> Result_<()> {
        let op = self.op;
        match self.stack.last() {
            Some(Value::Node(n)) => match &mut self.pickle.nodes[*n] {
                Node::Dict(entries) if values.len().is_multiple_of(2) => {
                    entries.extend(values.as_chunks::<2>().0.iter().map(|[key, value]| (*key, *value, op)));
                }
                _ => return self.wrong("a dict, and keys with values", "something else"),
            },
            _ => return self.wrong("a dict", "another value"),
        }
        Ok(())
    }

    fn global(&mut self, module: &str, name: &str) -> Result_<()> {
        match GLOBALS.iter().find(|g| (g.0, g.1) == (module, name)) {
            Some((_, _, global)) => self.push(Value::Global(*global)),
            None => return Err(self.fail(Problem::Global { name: format!("{module}.{name}") })),
        }
        Ok(())
    }

    /// The members of a tuple on top of the stack.
    fn pop_tuple(&mut self) -> Result_<Vec<Value<'a>>> {
        match self.pop()? {
            Value::Node(n) => match &self.pickle.nodes[n] {
                // Short ones alone are ever looked into; a copy of a long one for each call would be the square of the file.
                Node::Tuple(values) if values.len() <= 16 => Ok(values.clone()),
                _ => self.wrong("a tuple of at most 16 values", "another container"),
            },
            _ => self.wrong("a tuple", "another value"),
        }
    }

    /// `('storage', class, key, device, elements)`.
    fn persistent(&mut self) -> Result_<()> {
        let values = self.pop_tuple()?;
        let [
            Value::Text("storage"),
            Value::Global(Global::Storage(dtype, element)),
            Value::Text(key),
            Value::Text(_),
            Value::Int(elements),
        ] = values.as_slice()
        else {
            return self.wrong("('storage', class, key, device, elements)", "something else");
        };
        let Ok(elements) = u64::try_from(*elements) else { return self.wrong("a number of elements", elements.to_string()) };
        self.push(Value::Storage(self.pickle.storages.len()));
        self.pickle.storages.push(Storage { dtype, element: *element, key, elements });
        Ok(())
    }

    fn call(&mut self) -> Result_<()> {
        let values = self.pop_tuple()?;
        let Value::Global(global) = self.pop()? else { return self.wrong("a name that may be called", "another value") };
        match (global, values.as_slice()) {
            (Global::OrderedDict, []) => self.node(Node::Dict(Vec::new())),
            (Global::Tensor, [Value::Storage(storage), Value::Int(first), Value::Node(shape), Value::Node(strides), ..]) => {
                let tensor = Tensor {
                    storage: *storage,
                    first: u64::try_from(*first).or_else(|_| self.wrong("a first element", first.to_string()))?,
                    shape: self.numbers(*shape)?,
                    strides: self.numbers(*strides)?,
                };
                if tensor.shape.len() != tensor.strides.len() {
                    return self.wrong("a stride for each extent", format!("{:?} and {:?}", tensor.shape, tensor.strides));
                }
                self.push(Value::Tensor(self.pickle.tensors.len()));
                self.pickle.tensors.push(tensor);
            }
            (Global::Parameter, [tensor @ Value::Tensor(_), ..]) => self.push(*tensor),
            (global, _) => return self.wrong("arguments as torch.save writes them", format!("others, for {global:?}")),
        }
        Ok(())
    }

    /// At most eight numbers that are not negative.
    fn numbers(&self, node: usize) -> Result_<Vec<u64>> {
        let Node::Tuple(values) = &self.pickle.nodes[node] else { return self.wrong("a tuple of numbers", "another container") };
        if values.len() > 8 {
            return self.wrong("at most 8 extents", values.len().to_string());
        }
        let number = |value: &Value<'_>| if let Value::Int(n) = value { u64::try_from(*n).ok() } else { None };
        match values.iter().map(number).collect() {
            Some(numbers) => Ok(numbers),
            None => self.wrong("numbers that are not negative", "something else"),
        }
    }

    /// The attributes of a dict (its `_metadata`), which nothing reads.
    fn build(&mut self) -> Result_<()> {
        self.pop()?;
        match self.stack.last() {
            Some(Value::Node(n)) if matches!(self.pickle.nodes[*n], Node::Dict(_)) => Ok(()),
            _ => self.wrong("attributes of a dict", "those of something else"),
        }
    }
}

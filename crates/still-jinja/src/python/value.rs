//! Values. None of them changes once made, as in the sandbox; what does change (namespaces, loops) lies with the interpreter.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use serde_json::Value as Json;

use crate::error::{Error, ErrorKind, Result, type_error};
use crate::meter::Meter;

/// How deep lists and dictionaries nest, so that going through one never takes more stack than there is.
const MAX_VALUE_DEPTH: u16 = 200;

#[derive(Clone, Debug)]
pub(crate) enum Value {
    Undefined(Rc<Missing>),
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Str(Arc<str>),
    /// Text that `safe` or `escape` marked: what is added to it is escaped.
    Markup(Arc<str>),
    List(Rc<List>),
    Tuple(Rc<List>),
    /// `dict.keys()` and the like, by the name of their type.
    View(&'static str, Rc<List>),
    Dict(Rc<Dict>),
    Range(PyRange),
    Iterator(Rc<Once>),
    Function(Function),
    Method(Rc<(Value, &'static str)>),
    Object(Object),
}

/// What is said if an undefined value is used.
#[derive(Debug)]
pub(crate) struct Missing {
    pub kind: ErrorKind,
    pub message: String,
}

/// Something that changes or refers to the template, by its place in the interpreter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Object {
    Namespace(usize),
    Macro(usize),
    Loop(usize),
    Cycler(usize),
    Joiner(usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Function {
    Range,
    Dict,
    Namespace,
    Cycler,
    Joiner,
    RaiseException,
    StrftimeNow,
}

#[derive(Debug)]
pub(crate) struct List {
    pub items: Vec<Value>,
    depth: u16,
    /// Whether all items are: then so is a tuple of them.
    hashable: bool,
}

/// In the order of insertion; keys are compared one by one, which for a message's few is the fastest.
#[derive(Debug)]
pub(crate) struct Dict {
    pub entries: Vec<(Value, Value)>,
    depth: u16,
}

/// A generator: it gives its items once, has no length and is true.
#[derive(Debug)]
pub(crate) struct Once {
    pub list: Rc<List>,
    pub at: Cell<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PyRange {
    pub start: i128,
    pub stop: i128,
    pub step: i128,
}

impl PyRange {
    pub fn len(self) -> usize {
        let span = if self.step > 0 { self.stop - self.start } else { self.start - self.stop };
        if span <= 0 { 0 } else { ((span - 1) / self.step.abs() + 1) as usize }
    }

    pub fn get(self, index: usize) -> Value {
        Value::Int(self.start + self.step * index as i128)
    }
}

fn deeper(children: impl Iterator<Item = u16>) -> Result<u16> {
    let depth = children.max().unwrap_or(0) + 1;
    if depth > MAX_VALUE_DEPTH {
        let what = format!("lists and dictionaries nest deeper than {MAX_VALUE_DEPTH} levels");
        return Err(Error::new(ErrorKind::Limit, what));
    }
    Ok(depth)
}

impl List {
    pub fn new(items: Vec<Value>, meter: &Meter) -> Result<Rc<Self>> {
        meter.elements(items.len())?;
        let depth = deeper(items.iter().map(Value::depth))?;
        let hashable = items.iter().all(Value::is_hashable);
        Ok(Rc::new(Self { items, depth, hashable }))
    }
}

impl Dict {
    /// Later values of a key replace earlier ones in their place.
    pub fn new(entries: Vec<(Value, Value)>, meter: &Meter) -> Result<Rc<Self>> {
        meter.elements(2 * entries.len())?;
        let mut unique: Vec<(Value, Value)> = Vec::with_capacity(entries.len());
        for (key, value) in entries {
            if !key.is_hashable() {
                return Err(type_error(format!("unhashable type: '{}'", key.type_name())));
            }
            let mut place = None;
            for (n, (known, _)) in unique.iter().enumerate() {
                if known.equals(&key, meter)? {
                    place = Some(n);
                    break;
                }
            }
            match place {
                Some(n) => unique[n].1 = value,
                None => unique.push((key, value)),
            }
        }
        let depth = deeper(unique.iter().map(|(key, value)| key.depth().max(value.depth())))?;
        Ok(Rc::new(Self { entries: unique, depth }))
    }

    pub fn get(&self, key: &Value, meter: &Meter) -> Result<Option<&Value>> {
        if let Some(key) = key.as_str() {
            meter.steps(self.entries.len() as u64 / 8)?;
            return Ok(self.get_str(key));
        }
        for (known, value) in &self.entries {
            if known.equals(key, meter)? {
                return Ok(Some(value));
            }
        }
        Ok(None)
    }

    pub fn get_str(&self, key: &str) -> Option<&Value> {
        self.entries.iter().find(|(known, _)| known.as_str() == Some(key)).map(|(_, value)| value)
    }
}

impl Value {
    pub fn str(text: impl Into<Arc<str>>) -> Self {
        Self::Str(text.into())
    }

    /// Text marked as safe, with the texts in a list or tuple.
    pub fn marked(self, meter: &Meter) -> Result<Self> {
        let all = |list: &List| -> Result<Vec<Self>> {
            list.items.iter().map(|item| item.clone().marked(meter)).collect()
        };
        Ok(match self {
            Self::Str(text) => Self::Markup(text),
            Self::List(list) => Self::list(all(&list)?, meter)?,
            Self::Tuple(list) => Self::tuple(all(&list)?, meter)?,
            other => other,
        })
    }

    pub fn list(items: Vec<Value>, meter: &Meter) -> Result<Self> {
        Ok(Self::List(List::new(items, meter)?))
    }

    pub fn tuple(items: Vec<Value>, meter: &Meter) -> Result<Self> {
        Ok(Self::Tuple(List::new(items, meter)?))
    }

    pub fn iterator(items: Vec<Value>, meter: &Meter) -> Result<Self> {
        let list = List::new(items, meter)?;
        Ok(Self::Iterator(Rc::new(Once { list, at: Cell::new(0) })))
    }

    pub fn dict(entries: Vec<(Value, Value)>, meter: &Meter) -> Result<Self> {
        Ok(Self::Dict(Dict::new(entries, meter)?))
    }

    pub fn undefined(message: impl Into<String>) -> Self {
        Self::Undefined(Rc::new(Missing { kind: ErrorKind::Undefined, message: message.into() }))
    }

    /// What the sandbox keeps away: an error as soon as it is used.
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::Undefined(Rc::new(Missing { kind: ErrorKind::Security, message: message.into() }))
    }

    pub fn from_json(json: &Json, meter: &Meter) -> Result<Self> {
        Ok(match json {
            Json::Null => Self::None,
            Json::Bool(value) => Self::Bool(*value),
            Json::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
                (Some(value), _, _) => Self::Int(value.into()),
                (None, Some(value), _) => Self::Int(value.into()),
                (None, None, value) => Self::Float(value.unwrap_or(f64::NAN)),
            },
            Json::String(text) => Self::str(text.as_str()),
            Json::Array(items) => {
                let items = items.iter().map(|item| Self::from_json(item, meter));
                Self::list(items.collect::<Result<_>>()?, meter)?
            }
            Json::Object(entries) => {
                let pair = |(key, value): (&String, &Json)| {
                    Ok((Self::str(key.as_str()), Self::from_json(value, meter)?))
                };
                let entries = entries.iter().map(pair).collect::<Result<Vec<_>>>()?;
                meter.elements(2 * entries.len())?;
                // An object's keys are distinct already.
                let depth = deeper(entries.iter().map(|(_, value)| value.depth()))?;
                Self::Dict(Rc::new(Dict { entries, depth }))
            }
        })
    }

    pub fn depth(&self) -> u16 {
        match self {
            Self::List(list) | Self::Tuple(list) | Self::View(_, list) => list.depth,
            Self::Dict(dict) => dict.depth,
            Self::Iterator(once) => once.list.depth,
            Self::Method(method) => method.0.depth(),
            _ => 0,
        }
    }

    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::Str(text) | Self::Markup(text) => Some(text),
            _ => None,
        }
    }

    pub fn is_hashable(&self) -> bool {
        match self {
            Self::List(_) | Self::Dict(_) | Self::View(..) => false,
            Self::Tuple(list) => list.hashable,
            _ => true,
        }
    }

    pub fn is_true(&self) -> bool {
        match self {
            Self::Undefined(_) | Self::None => false,
            Self::Bool(value) => *value,
            Self::Int(value) => *value != 0,
            Self::Float(value) => *value != 0.0,
            Self::Str(text) | Self::Markup(text) => !text.is_empty(),
            Self::List(list) | Self::Tuple(list) | Self::View(_, list) => !list.items.is_empty(),
            Self::Dict(dict) => !dict.entries.is_empty(),
            Self::Range(range) => range.len() > 0,
            _ => true,
        }
    }

    /// Python's name for the type.
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::Undefined(_) => "Undefined",
            Self::None => "NoneType",
            Self::Bool(_) => "bool",
            Self::Int(_) => "int",
            Self::Float(_) => "float",
            Self::Str(_) => "str",
            Self::Markup(_) => "Markup",
            Self::List(_) => "list",
            Self::Tuple(_) => "tuple",
            Self::View(name, _) => name,
            Self::Dict(_) => "dict",
            Self::Range(_) => "range",
            Self::Iterator(_) => "generator",
            Self::Function(_) => "function",
            Self::Method(_) => "builtin_function_or_method",
            Self::Object(Object::Namespace(_)) => "Namespace",
            Self::Object(Object::Macro(_)) => "Macro",
            Self::Object(Object::Loop(_)) => "LoopContext",
            Self::Object(Object::Cycler(_)) => "Cycler",
            Self::Object(Object::Joiner(_)) => "Joiner",
        }
    }

    /// An undefined value may be printed, tested and gone through, and nothing else.
    pub fn used(&self) -> Result<&Self> {
        match self {
            Self::Undefined(missing) => Err(Error::new(missing.kind, missing.message.clone())),
            _ => Ok(self),
        }
    }
}

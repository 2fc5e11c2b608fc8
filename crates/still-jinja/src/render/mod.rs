//! What follows from a template and its variables.

mod calls;
mod expressions;
mod scope;
mod statements;

use std::ops::Range;
use std::rc::Rc;
use std::time::SystemTime;

use serde_json::{Map, Value as Json};

use crate::Rendered;
use crate::ast;
use crate::error::{Error, ErrorKind, Result};
use crate::meter::Meter;
use crate::python::value::{List, Value};
use scope::Scope;

/// How deep expressions, blocks and calls of macros nest while they are worked on.
pub(crate) const MAX_DEPTH: usize = 1000;
/// Text that any template may write, and that it may write for each byte that it is given.
const OUTPUT_BYTES: usize = 16 << 20;
const OUTPUT_PER_BYTE: usize = 16;

/// Renders statements with these variables.
pub(crate) fn render<'t>(
    body: &'t [ast::Stmt],
    variables: &'t Map<String, Json>,
    now: SystemTime,
) -> Result<Rendered> {
    let size = variables.iter().map(|(key, value)| key.len() + json_size(value)).sum();
    let meter = Meter::new(size);
    let mut globals = Vec::with_capacity(variables.len());
    // What is given is no work of the template.
    let given = Meter::new(size.saturating_mul(64));
    for (name, value) in variables {
        globals.push((name.as_str(), Value::from_json(value, &given)?));
    }
    let scope = Scope::root(globals);
    let mut interpreter = Interpreter {
        meter,
        now,
        output: vec![String::new()],
        output_left: OUTPUT_BYTES + OUTPUT_PER_BYTE * size,
        depth: 0,
        root: scope.clone(),
        namespaces: Vec::new(),
        macros: Vec::new(),
        loops: Vec::new(),
        cyclers: Vec::new(),
        joiners: Vec::new(),
        generated: Vec::new(),
        generates: false,
        is_lost: false,
    };
    interpreter.run(body, &scope)?;
    let text = interpreter.output.pop().unwrap_or_default();
    let told = interpreter.generates && !interpreter.is_lost;
    Ok(Rendered { text, generated: told.then_some(interpreter.generated) })
}

fn json_size(value: &Json) -> usize {
    match value {
        Json::String(text) => text.len() + 8,
        Json::Array(items) => 8 + items.iter().map(json_size).sum::<usize>(),
        Json::Object(entries) => {
            8 + entries.iter().map(|(key, value)| key.len() + json_size(value)).sum::<usize>()
        }
        _ => 8,
    }
}

/// How a block ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flow {
    On,
    Break,
    Continue,
}

/// A macro with the variables that it sees.
struct MacroObject<'t> {
    template: &'t ast::Macro,
    scope: Rc<Scope<'t>>,
}

/// A loop that is being gone through.
struct LoopObject<'t> {
    template: &'t ast::For,
    /// What its `in` was evaluated in, for recursion.
    scope: Rc<Scope<'t>>,
    items: Rc<List>,
    index: usize,
    depth0: usize,
    changed: Option<Vec<Value>>,
}

struct Interpreter<'t> {
    meter: Meter,
    now: SystemTime,
    /// What is written; blocks whose text is taken up write to the last.
    output: Vec<String>,
    output_left: usize,
    depth: usize,
    root: Rc<Scope<'t>>,
    namespaces: Vec<Vec<(String, Value)>>,
    macros: Vec<MacroObject<'t>>,
    loops: Vec<LoopObject<'t>>,
    cyclers: Vec<(Vec<Value>, usize)>,
    joiners: Vec<(Value, bool)>,
    generated: Vec<Range<usize>>,
    generates: bool,
    is_lost: bool,
}

impl<'t> Interpreter<'t> {
    fn write(&mut self, text: &str) -> Result<()> {
        self.meter.bytes(text.len())?;
        let Some(left) = self.output_left.checked_sub(text.len()) else {
            return Err(Error::new(ErrorKind::Limit, "writes more text than a template may"));
        };
        self.output_left = left;
        if let Some(out) = self.output.last_mut() {
            out.push_str(text);
        }
        Ok(())
    }

    /// What `work` writes, taken up.
    fn captured(&mut self, work: impl FnOnce(&mut Self) -> Result<Flow>) -> Result<(String, Flow)> {
        self.output.push(String::new());
        let flow = work(self);
        let text = self.output.pop().unwrap_or_default();
        Ok((text, flow?))
    }

    /// Runs `work` one level deeper.
    fn deeper<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if self.depth == MAX_DEPTH {
            let what = format!("nests or calls deeper than {MAX_DEPTH} levels");
            return Err(Error::new(ErrorKind::Limit, what));
        }
        self.depth += 1;
        let result = work(self);
        self.depth -= 1;
        result
    }
}

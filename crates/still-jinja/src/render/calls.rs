//! Functions, methods, macros and loops that are called.

use std::rc::Rc;

use super::scope::Scope;
use super::{Interpreter, LoopObject};
use crate::ast::{Expr, Post};
use crate::error::{Error, ErrorKind, Result, type_error};
use crate::python::args::{CallArgs, required, text};
use crate::python::methods;
use crate::python::sequence::{attribute, iterate, range};
use crate::python::time::strftime;
use crate::python::value::{Function, Object, Value};

impl<'t> Interpreter<'t> {
    pub(super) fn call(&mut self, value: &Value, args: CallArgs) -> Result<Value> {
        match value {
            Value::Method(method) => match &method.0 {
                Value::Object(Object::Loop(at)) => self.loop_method(*at, method.1, args),
                Value::Object(Object::Cycler(at)) => Ok(self.cycle(*at, method.1)),
                on => methods::call(on, method.1, args, &self.meter),
            },
            Value::Function(function) => self.function(*function, args),
            Value::Object(Object::Macro(at)) => self.deeper(|this| this.call_macro(*at, args)),
            Value::Object(Object::Loop(at)) => self.deeper(|this| this.recurse(*at, args)),
            Value::Object(Object::Joiner(at)) => {
                let [] = args.places("joiner")?;
                let (separator, used) = &mut self.joiners[*at];
                let first = !std::mem::replace(used, true);
                Ok(if first { Value::str("") } else { separator.clone() })
            }
            other => {
                let name = other.used()?.type_name();
                Err(type_error(format!("'{name}' object is not callable")))
            }
        }
    }

    fn function(&mut self, function: Function, args: CallArgs) -> Result<Value> {
        let name = function.name();
        match function {
            Function::Range => {
                if !args.keywords.is_empty() {
                    return Err(type_error("range() takes no keyword arguments"));
                }
                range(&args.positional)
            }
            Function::Dict => {
                let entries = self.dict_entries(args)?;
                Value::dict(entries, &self.meter)
            }
            Function::Namespace => {
                let entries = self.dict_entries(args)?;
                self.meter.elements(4)?;
                self.namespaces.push(Vec::new());
                let at = self.namespaces.len() - 1;
                for (key, value) in entries {
                    let key = text(&key, name)?.to_owned();
                    self.set_attribute(at, &key, value)?;
                }
                Ok(Value::Object(Object::Namespace(at)))
            }
            Function::Cycler => {
                if args.positional.is_empty() {
                    return Err(type_error("at least one item has to be provided"));
                }
                self.cyclers.push((args.positional, 0));
                Ok(Value::Object(Object::Cycler(self.cyclers.len() - 1)))
            }
            Function::Joiner => {
                let [separator] = args.bind(name, ["sep"])?;
                self.joiners.push((separator.unwrap_or_else(|| Value::str(", ")), false));
                Ok(Value::Object(Object::Joiner(self.joiners.len() - 1)))
            }
            Function::RaiseException => {
                let [message] = args.bind(name, ["message"])?;
                let message = required(message, name, "message")?;
                let message = crate::python::text::to_str(&message, &self.meter)?;
                Err(Error::new(ErrorKind::Raised, message))
            }
            Function::StrftimeNow => {
                let [format] = args.bind(name, ["format"])?;
                let format = required(format, name, "format")?;
                Ok(Value::str(strftime(text(&format, name)?, self.now)?))
            }
        }
    }

    /// What `dict(…)` is made of.
    fn dict_entries(&self, args: CallArgs) -> Result<Vec<(Value, Value)>> {
        let mut entries = Vec::new();
        if args.positional.len() > 1 {
            return Err(type_error("dict expected at most 1 argument"));
        }
        match args.positional.first() {
            None => {}
            Some(Value::Dict(dict)) => entries.extend(dict.entries.iter().cloned()),
            Some(pairs) => {
                for pair in &iterate(pairs, &self.meter)?.items {
                    match &iterate(pair, &self.meter)?.items[..] {
                        [key, value] => entries.push((key.clone(), value.clone())),
                        _ => return Err(type_error("dict needs pairs")),
                    }
                }
            }
        }
        entries.extend(
            args.keywords
                .into_iter()
                .map(|(name, value)| (Value::str(String::as_str(&name)), value)),
        );
        Ok(entries)
    }

    pub(super) fn set_attribute(&mut self, at: usize, name: &str, value: Value) -> Result<()> {
        if name.starts_with('_') {
            let what = format!(
                "Chat templates cannot store underscore-prefixed attributes on a namespace, but got '{name}'. \
                 Please rename the attribute."
            );
            return Err(Error::new(ErrorKind::Security, what));
        }
        let attributes = &mut self.namespaces[at];
        self.meter.steps(attributes.len() as u64 / 8)?;
        match attributes.iter_mut().find(|(known, _)| known == name) {
            Some((_, place)) => *place = value,
            None => {
                self.meter.elements(2)?;
                attributes.push((name.to_owned(), value));
            }
        }
        Ok(())
    }

    /// `{% call f(…) %}`: the call gets the block as `caller`.
    pub(super) fn call_with_caller(
        &mut self,
        call: &'t Expr,
        caller: Value,
        scope: &Rc<Scope<'t>>,
    ) -> Result<Value> {
        let Expr::Postfix(first, posts) = call else {
            return Err(type_error("expected a call"));
        };
        let Some((Post::Call(args), before)) = posts.split_last() else {
            return Err(type_error("expected a call"));
        };
        let mut value = self.evaluate(first, scope)?;
        for after in before {
            value = self.post(value, after, scope)?;
        }
        let mut args = self.arguments(args, scope)?;
        args.keywords.push(("caller".into(), caller));
        self.call(&value, args)
    }

    fn call_macro(&mut self, at: usize, args: CallArgs) -> Result<Value> {
        let template = self.macros[at].template;
        let scope = Scope::inside(&self.macros[at].scope);
        let name = template.name.as_deref().unwrap_or("caller");
        let CallArgs { positional, mut keywords } = args;
        let count = template.parameters.len();
        let more: Vec<Value> = positional.get(count..).unwrap_or_default().to_vec();
        if !more.is_empty() && !template.takes_varargs {
            let what = format!("macro '{name}' takes not more than {count} argument(s)");
            return Err(type_error(what));
        }
        let mut positional = positional.into_iter();
        for (parameter, default) in &template.parameters {
            let named = keywords.iter().position(|(name, _)| name == parameter);
            let value = match (positional.next(), named, default) {
                (Some(value), _, _) => value,
                (None, Some(at), _) => keywords.remove(at).1,
                // Defaults see the parameters before them.
                (None, None, Some(default)) => self.evaluate(default, &scope)?,
                (None, None, None) => {
                    Value::undefined(format!("parameter '{parameter}' was not provided"))
                }
            };
            scope.set(parameter, value);
        }
        if template.takes_caller && !template.parameters.iter().any(|(name, _)| name == "caller") {
            let caller = keywords.iter().position(|(name, _)| name == "caller");
            let caller = caller.map(|at| keywords.remove(at).1);
            scope.set("caller", caller.unwrap_or_else(|| Value::undefined("No caller defined")));
        }
        if template.takes_kwargs {
            let pair = |(name, value): (String, Value)| (Value::str(&*name), value);
            let rest = std::mem::take(&mut keywords).into_iter().map(pair).collect();
            scope.set("kwargs", Value::dict(rest, &self.meter)?);
        } else if let Some((unknown, _)) = keywords.first() {
            let what = format!("macro '{name}' takes no keyword argument '{unknown}'");
            return Err(type_error(what));
        }
        if template.takes_varargs {
            scope.set("varargs", Value::tuple(more, &self.meter)?);
        }
        let (text, _) = self.captured(|this| this.run(&template.body, &scope))?;
        Ok(Value::str(text))
    }

    /// `loop(items)` of a recursive loop.
    fn recurse(&mut self, at: usize, args: CallArgs) -> Result<Value> {
        let LoopObject { template, scope, depth0, .. } = &self.loops[at];
        let (template, scope, depth) = (*template, scope.clone(), depth0 + 1);
        if !template.recursive {
            let what =
                "Tried to call non recursive loop. Maybe you forgot the 'recursive' modifier.";
            return Err(type_error(what));
        }
        let [items] = args.places("loop")?;
        let items = required(items, "loop", "iterable")?;
        let (text, _) = self.captured(|this| this.go_through(template, &items, &scope, depth))?;
        Ok(Value::str(text))
    }

    pub(super) fn loop_attribute(&self, at: usize, name: &str) -> Result<Value> {
        let this = &self.loops[at];
        let (index, length) = (this.index, this.items.items.len());
        let number = |value: usize| Value::Int(value as i128);
        let neighbor = |at: Option<usize>, which: &str| {
            let found = at.and_then(|at| this.items.items.get(at)).cloned();
            found.unwrap_or_else(|| Value::undefined(format!("there is no {which} item")))
        };
        let method = |name| Ok(Value::Method(Rc::new((Value::Object(Object::Loop(at)), name))));
        Ok(match name {
            "index" => number(index + 1),
            "index0" => number(index),
            "revindex" => number(length - index),
            "revindex0" => number(length - index - 1),
            "first" => Value::Bool(index == 0),
            "last" => Value::Bool(index + 1 == length),
            "length" => number(length),
            "depth" => number(this.depth0 + 1),
            "depth0" => number(this.depth0),
            "previtem" => neighbor(index.checked_sub(1), "previous"),
            "nextitem" => neighbor(Some(index + 1), "next"),
            "cycle" => return method("cycle"),
            "changed" => return method("changed"),
            _ => return attribute(&Value::Object(Object::Loop(at)), name, &self.meter),
        })
    }

    fn loop_method(&mut self, at: usize, name: &str, args: CallArgs) -> Result<Value> {
        let index = self.loops[at].index;
        if name == "cycle" {
            let items = args.positional;
            return match items.len() {
                0 => Err(type_error("no items for cycling given")),
                count => Ok(items[index % count].clone()),
            };
        }
        let values = args.positional;
        let same = match &self.loops[at].changed {
            Some(known) if known.len() == values.len() => {
                let mut same = true;
                for (known, value) in known.iter().zip(&values) {
                    same &= known.equals(value, &self.meter)?;
                }
                same
            }
            _ => false,
        };
        if !same {
            self.loops[at].changed = Some(values);
        }
        Ok(Value::Bool(!same))
    }

    fn cycle(&mut self, at: usize, method: &str) -> Value {
        let (items, place) = &mut self.cyclers[at];
        if method == "reset" {
            *place = 0;
            return Value::None;
        }
        let current = items[*place].clone();
        *place = (*place + 1) % items.len();
        current
    }
}

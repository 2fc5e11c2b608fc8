//! Expressions.

use std::rc::Rc;

use super::Interpreter;
use super::scope::Scope;
use crate::ast::{Args, Const, Expr, Post};
use crate::error::{Result, type_error};
use crate::python::args::CallArgs;
use crate::python::filters::filter;
use crate::python::operators::{compare, math, sign};
use crate::python::sequence::{attribute, item, iterate, slice};
use crate::python::tests::test;
use crate::python::text::write_str;
use crate::python::value::{Function, Object, Value};

impl<'t> Interpreter<'t> {
    pub(super) fn evaluate(&mut self, value: &'t Expr, scope: &Rc<Scope<'t>>) -> Result<Value> {
        self.meter.steps(1)?;
        match value {
            Expr::Const(value) => Ok(match value {
                Const::None => Value::None,
                Const::Bool(value) => Value::Bool(*value),
                Const::Int(value) => Value::Int(*value),
                Const::Float(value) => Value::Float(*value),
                Const::Str(text) => Value::Str(text.clone()),
            }),
            Expr::Name(name) => self.lookup(name, scope),
            other => self.deeper(|this| this.composed(other, scope)),
        }
    }

    fn all(&mut self, values: &'t [Expr], scope: &Rc<Scope<'t>>) -> Result<Vec<Value>> {
        values.iter().map(|value| self.evaluate(value, scope)).collect()
    }

    fn composed(&mut self, value: &'t Expr, scope: &Rc<Scope<'t>>) -> Result<Value> {
        Ok(match value {
            Expr::Const(_) | Expr::Name(_) => return self.evaluate(value, scope),
            Expr::Tuple(items) => Value::tuple(self.all(items, scope)?, &self.meter)?,
            Expr::List(items) => Value::list(self.all(items, scope)?, &self.meter)?,
            Expr::Dict(items) => {
                let mut entries = Vec::with_capacity(items.len());
                for (key, value) in items {
                    entries.push((self.evaluate(key, scope)?, self.evaluate(value, scope)?));
                }
                Value::dict(entries, &self.meter)?
            }
            Expr::Cond(parts) => {
                let (test, yes, no) = &**parts;
                match (self.evaluate(test, scope)?.is_true(), no) {
                    (true, _) => self.evaluate(yes, scope)?,
                    (false, Some(no)) => self.evaluate(no, scope)?,
                    (false, None) => Value::undefined(
                        "the inline if-expression evaluated to false and no else section was defined",
                    ),
                }
            }
            Expr::Or(values) => self.first_where(values, true, scope)?,
            Expr::And(values) => self.first_where(values, false, scope)?,
            Expr::Not(value) => Value::Bool(!self.evaluate(value, scope)?.is_true()),
            Expr::Compare(first, rest) => {
                let mut left = self.evaluate(first, scope)?;
                for (op, right) in rest {
                    let right = self.evaluate(right, scope)?;
                    if !compare(*op, &left, &right, &self.meter)? {
                        return Ok(Value::Bool(false));
                    }
                    left = right;
                }
                Value::Bool(true)
            }
            Expr::Math(first, rest) => {
                let mut left = self.evaluate(first, scope)?;
                for (op, right) in rest {
                    let right = self.evaluate(right, scope)?;
                    left = math(*op, &left, &right, &self.meter)?;
                }
                left
            }
            Expr::Concat(values) => {
                let mut text = String::new();
                for value in values {
                    let value = self.evaluate(value, scope)?;
                    write_str(&value, &mut text, &self.meter)?;
                }
                Value::str(text)
            }
            Expr::Neg(value) => sign(&self.evaluate(value, scope)?, true)?,
            Expr::Pos(value) => sign(&self.evaluate(value, scope)?, false)?,
            Expr::Postfix(first, posts) => {
                let mut value = self.evaluate(first, scope)?;
                for after in posts {
                    value = self.post(value, after, scope)?;
                }
                value
            }
        })
    }

    /// The first value that is as true as wanted, or the last.
    fn first_where(
        &mut self,
        values: &'t [Expr],
        wanted: bool,
        scope: &Rc<Scope<'t>>,
    ) -> Result<Value> {
        let mut found = Value::Bool(!wanted);
        for value in values {
            found = self.evaluate(value, scope)?;
            if found.is_true() == wanted {
                break;
            }
        }
        Ok(found)
    }

    /// A variable, a global or an undefined value.
    pub(super) fn lookup(&self, name: &'t str, scope: &Rc<Scope<'t>>) -> Result<Value> {
        let (found, looked) = scope.get(name);
        self.meter.steps(looked as u64 / 16)?;
        if let Some(value) = found {
            return Ok(value);
        }
        let function = match name {
            "range" => Function::Range,
            "dict" => Function::Dict,
            "namespace" => Function::Namespace,
            "cycler" => Function::Cycler,
            "joiner" => Function::Joiner,
            "raise_exception" => Function::RaiseException,
            "strftime_now" => Function::StrftimeNow,
            _ => return Ok(Value::undefined(format!("'{name}' is undefined"))),
        };
        Ok(Value::Function(function))
    }

    pub(super) fn post(
        &mut self,
        value: Value,
        after: &'t Post,
        scope: &Rc<Scope<'t>>,
    ) -> Result<Value> {
        self.meter.steps(1)?;
        match after {
            Post::Attr(name) => self.attribute(&value, name),
            Post::Item(at) => {
                let at = self.evaluate(at, scope)?;
                match (&value, &at) {
                    (Value::Object(_), Value::Str(name)) => self.attribute(&value, name),
                    _ => item(&value, &at, &self.meter),
                }
            }
            Post::Slice(parts) => {
                let mut bounds = [None, None, None];
                for (bound, part) in bounds.iter_mut().zip(parts.iter()) {
                    if let Some(part) = part {
                        *bound = Some(self.evaluate(part, scope)?);
                    }
                }
                slice(&value, bounds, &self.meter)
            }
            Post::Call(args) => {
                let args = self.arguments(args, scope)?;
                self.call(&value, args)
            }
            Post::Filter(name, args) => {
                let args = self.arguments(args, scope)?;
                filter(name, &value, args, &self.meter)
            }
            Post::Test { name, args, negated } => {
                let args = self.arguments(args, scope)?;
                Ok(Value::Bool(test(name, &value, args, &self.meter)? != *negated))
            }
        }
    }

    fn attribute(&mut self, value: &Value, name: &str) -> Result<Value> {
        match value {
            Value::Object(Object::Namespace(at)) => {
                let attributes = &self.namespaces[*at];
                self.meter.steps(attributes.len() as u64 / 8)?;
                let found = attributes.iter().find(|(known, _)| known == name);
                Ok(found.map_or_else(
                    || Value::undefined(format!("namespace has no attribute '{name}'")),
                    |(_, value)| value.clone(),
                ))
            }
            Value::Object(Object::Loop(at)) => self.loop_attribute(*at, name),
            Value::Object(Object::Macro(at)) => {
                let template = self.macros[*at].template;
                Ok(match name {
                    "name" => template.name.as_deref().map_or(Value::None, Value::str),
                    "arguments" => {
                        let names = template.parameters.iter().map(|(name, _)| Value::str(&**name));
                        Value::tuple(names.collect(), &self.meter)?
                    }
                    _ => attribute(value, name, &self.meter)?,
                })
            }
            Value::Object(Object::Cycler(at)) if name == "current" => {
                let (items, place) = &self.cyclers[*at];
                Ok(items[*place].clone())
            }
            _ => attribute(value, name, &self.meter),
        }
    }

    pub(super) fn arguments(&mut self, args: &'t Args, scope: &Rc<Scope<'t>>) -> Result<CallArgs> {
        let mut positional = self.all(&args.positional, scope)?;
        let mut keywords = Vec::with_capacity(args.keywords.len());
        for (name, value) in &args.keywords {
            keywords.push((name.clone(), self.evaluate(value, scope)?));
        }
        if let Some(star) = &args.star {
            let star = self.evaluate(star, scope)?;
            positional.extend(iterate(&star, &self.meter)?.items.iter().cloned());
        }
        if let Some(star) = &args.star_star {
            let Value::Dict(dict) = self.evaluate(star, scope)? else {
                return Err(type_error("argument after ** must be a mapping"));
            };
            for (key, value) in &dict.entries {
                let Value::Str(key) = key else {
                    return Err(type_error("keywords must be strings"));
                };
                keywords.push((key.to_string(), value.clone()));
            }
        }
        self.meter.elements(positional.len() + keywords.len())?;
        Ok(CallArgs { positional, keywords })
    }
}

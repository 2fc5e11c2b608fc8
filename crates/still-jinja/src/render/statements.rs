//! Statements.

use std::rc::Rc;

use super::scope::Scope;
use super::{Flow, Interpreter, LoopObject, MacroObject};
use crate::ast::{For, Post, Stmt, StmtKind, Target};
use crate::error::{Result, type_error};
use crate::python::sequence::iterate;
use crate::python::text::write_str;
use crate::python::value::{List, Object, Value};

impl<'t> Interpreter<'t> {
    pub(super) fn run(&mut self, body: &'t [Stmt], scope: &Rc<Scope<'t>>) -> Result<Flow> {
        self.deeper(|this| {
            for stmt in body {
                this.meter.steps(1).map_err(|error| error.on_line(stmt.line))?;
                let flow =
                    this.statement(&stmt.kind, scope).map_err(|error| error.on_line(stmt.line))?;
                if flow != Flow::On {
                    return Ok(flow);
                }
            }
            Ok(Flow::On)
        })
    }

    fn statement(&mut self, stmt: &'t StmtKind, scope: &Rc<Scope<'t>>) -> Result<Flow> {
        match stmt {
            StmtKind::Data(text) => self.write(text)?,
            StmtKind::Print(values) => {
                for value in values {
                    let value = self.evaluate(value, scope)?;
                    self.print(&value)?;
                }
            }
            StmtKind::Set(target, value) => {
                let value = self.evaluate(value, scope)?;
                self.assign(target, value, scope)?;
            }
            StmtKind::SetBlock(target, filters, body) => {
                let (text, flow) = self.block(body, scope)?;
                let value = self.filtered(text, filters, scope)?;
                self.assign(target, value, scope)?;
                return Ok(flow);
            }
            StmtKind::For(stmt) => {
                let items = self.evaluate(&stmt.iter, scope)?;
                return self.go_through(stmt, &items, scope, 0);
            }
            StmtKind::If(branches, otherwise) => {
                for (test, body) in branches {
                    if self.evaluate(test, scope)?.is_true() {
                        return self.run(body, scope);
                    }
                }
                return self.run(otherwise, scope);
            }
            StmtKind::With(values, body) => {
                let inner = Scope::inside(scope);
                for (target, value) in values {
                    let value = self.evaluate(value, scope)?;
                    self.assign(target, value, &inner)?;
                }
                return self.run(body, &inner);
            }
            StmtKind::Macro(template) => {
                let value = self.new_macro(template, scope)?;
                if let Some(name) = &template.name {
                    scope.set(name, value);
                }
            }
            StmtKind::Call(template, call) => {
                let caller = self.new_macro(template, scope)?;
                let value = self.call_with_caller(call, caller, scope)?;
                self.print(&value)?;
            }
            StmtKind::Filter(filters, body) => {
                let (text, flow) = self.block(body, scope)?;
                let value = self.filtered(text, filters, scope)?;
                self.print(&value)?;
                return Ok(flow);
            }
            StmtKind::Generation(body) => {
                self.generates = true;
                let direct = self.output.len() == 1;
                self.is_lost |= !direct;
                let start = self.output.last().map_or(0, String::len);
                let flow = self.run(body, &Scope::inside(scope))?;
                if direct {
                    self.generated.push(start..self.output[0].len());
                }
                return Ok(flow);
            }
            StmtKind::Block(scoped, body) => {
                let around = if *scoped { scope.clone() } else { self.root.clone() };
                return self.run(body, &Scope::inside(&around));
            }
            StmtKind::Scope(body) => return self.run(body, &Scope::inside(scope)),
            StmtKind::Break => return Ok(Flow::Break),
            StmtKind::Continue => return Ok(Flow::Continue),
        }
        Ok(Flow::On)
    }

    /// `{{ value }}`.
    fn print(&mut self, value: &Value) -> Result<()> {
        match value {
            Value::Str(text) => self.write(text),
            Value::Undefined(_) => Ok(()),
            other => {
                let mut text = String::new();
                write_str(other, &mut text, &self.meter)?;
                self.write(&text)
            }
        }
    }

    /// A body with variables of its own, its text taken up.
    fn block(&mut self, body: &'t [Stmt], scope: &Rc<Scope<'t>>) -> Result<(String, Flow)> {
        let inner = Scope::inside(scope);
        self.captured(|this| this.run(body, &inner))
    }

    fn filtered(
        &mut self,
        text: String,
        filters: &'t [Post],
        scope: &Rc<Scope<'t>>,
    ) -> Result<Value> {
        let mut value = Value::str(text);
        for filter in filters {
            value = self.post(value, filter, scope)?;
        }
        Ok(value)
    }

    fn new_macro(
        &mut self,
        template: &'t crate::ast::Macro,
        scope: &Rc<Scope<'t>>,
    ) -> Result<Value> {
        self.meter.elements(4)?;
        self.macros.push(MacroObject { template, scope: scope.clone() });
        Ok(Value::Object(Object::Macro(self.macros.len() - 1)))
    }

    pub(super) fn assign(
        &mut self,
        target: &'t Target,
        value: Value,
        scope: &Rc<Scope<'t>>,
    ) -> Result<()> {
        match target {
            Target::Name(name) => scope.set(name, value),
            Target::Namespace(name, attribute) => {
                let Value::Object(Object::Namespace(at)) = self.lookup(name, scope)? else {
                    return Err(type_error("cannot assign attribute on non-namespace object"));
                };
                self.set_attribute(at, attribute, value)?;
            }
            Target::Tuple(targets) => {
                let items = iterate(&value, &self.meter)?;
                let (wanted, found) = (targets.len(), items.items.len());
                if wanted != found {
                    let many = if found > wanted { "too many" } else { "not enough" };
                    let what = format!("{many} values to unpack (expected {wanted}, got {found})");
                    return Err(type_error(what));
                }
                for (target, value) in targets.iter().zip(&items.items) {
                    self.assign(target, value.clone(), scope)?;
                }
            }
        }
        Ok(())
    }

    /// A loop over these items.
    pub(super) fn go_through(
        &mut self,
        stmt: &'t For,
        items: &Value,
        scope: &Rc<Scope<'t>>,
        depth0: usize,
    ) -> Result<Flow> {
        let mut items = iterate(items, &self.meter)?;
        if let Some(filter) = &stmt.filter {
            let mut kept = Vec::new();
            for item in &items.items {
                self.meter.steps(1)?;
                let inner = Scope::inside(scope);
                self.assign(&stmt.target, item.clone(), &inner)?;
                if self.evaluate(filter, &inner)?.is_true() {
                    kept.push(item.clone());
                }
            }
            items = List::new(kept, &self.meter)?;
        }
        if items.items.is_empty() {
            return self.run(&stmt.otherwise, &Scope::inside(scope));
        }
        self.meter.elements(4)?;
        self.loops.push(LoopObject {
            template: stmt,
            scope: scope.clone(),
            items: items.clone(),
            index: 0,
            depth0,
            changed: None,
        });
        let place = self.loops.len() - 1;
        for (n, item) in items.items.iter().enumerate() {
            self.meter.steps(2)?;
            self.loops[place].index = n;
            let inner = Scope::inside(scope);
            inner.set("loop", Value::Object(Object::Loop(place)));
            self.assign(&stmt.target, item.clone(), &inner)?;
            if self.run(&stmt.body, &inner)? == Flow::Break {
                break;
            }
        }
        Ok(Flow::On)
    }
}

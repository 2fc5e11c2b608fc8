//! Text and tags.

use super::Parser;
use super::lexer::Tok;
use super::names::mentions;
use crate::ast::{Expr, For, Macro, Stmt, StmtKind, Target};
use crate::error::{Error, ErrorKind, Result};

impl Parser<'_> {
    /// Statements up to a tag of `ends`, whose name is the next token then; without `ends`, to the end.
    pub(super) fn statements(&mut self, ends: &[&'static str]) -> Result<Vec<Stmt>> {
        let mut body = Vec::new();
        loop {
            let line = self.line();
            let kind = match self.peek() {
                Tok::Eof if ends.is_empty() => return Ok(body),
                Tok::Eof => {
                    let looked = ends.join("' or '");
                    return self.fail(format!(
                        "unexpected end of template: looking for '{looked}' of '{}'",
                        self.open.last().unwrap_or(&"")
                    ));
                }
                Tok::Data(text) => {
                    self.next();
                    StmtKind::Data((*text).to_owned())
                }
                Tok::VariableBegin => {
                    self.next();
                    let value = self.tuple(true, &[], false)?;
                    self.expect(&Tok::VariableEnd)?;
                    StmtKind::Print(vec![value])
                }
                Tok::BlockBegin => {
                    self.next();
                    if matches!(self.peek(), Tok::Name(name) if ends.contains(name)) {
                        return Ok(body);
                    }
                    let kind = self.nested(Self::tag)?;
                    self.expect(&Tok::BlockEnd)?;
                    kind
                }
                _ => return self.fail(format!("unexpected {}", self.described())),
            };
            body.push(Stmt { line, kind });
        }
    }

    /// The body of a tag and the name that ended it.
    fn body(
        &mut self,
        tag: &'static str,
        ends: &[&'static str],
    ) -> Result<(Vec<Stmt>, &'static str)> {
        self.skip_op(":");
        self.expect(&Tok::BlockEnd)?;
        self.open.push(tag);
        // What is a function in Python begins anew.
        let outside = self.loops;
        if matches!(tag, "macro" | "call" | "generation" | "block") {
            self.loops = 0;
        }
        let body = self.statements(ends)?;
        self.loops = outside;
        self.open.pop();
        let name = self.expect_name()?;
        let end = ends.iter().find(|end| **end == name).copied().unwrap_or("");
        Ok((body, end))
    }

    fn tag(&mut self) -> Result<StmtKind> {
        let line = self.line();
        let name = self.expect_name()?;
        match name {
            "set" => self.set(),
            "for" => self.for_loop(),
            "if" => self.conditional(),
            "with" => self.with(),
            "macro" => {
                let name = self.expect_name()?.to_owned();
                let parameters = self.signature()?;
                let (body, _) = self.body("macro", &["endmacro"])?;
                Ok(StmtKind::Macro(new_macro(Some(name), parameters, body)))
            }
            "call" => {
                let parameters = if self.is_op("(") { self.signature()? } else { Vec::new() };
                let call = self.expression(true)?;
                let (body, _) = self.body("call", &["endcall"])?;
                Ok(StmtKind::Call(new_macro(None, parameters, body), call))
            }
            "filter" => {
                let filters = self.filters(true)?;
                let (body, _) = self.body("filter", &["endfilter"])?;
                Ok(StmtKind::Filter(filters, body))
            }
            "generation" => {
                let (body, _) = self.body("generation", &["endgeneration"])?;
                Ok(StmtKind::Generation(body))
            }
            "print" => {
                let mut values = Vec::new();
                while *self.peek() != Tok::BlockEnd {
                    if !values.is_empty() {
                        self.expect_op(",")?;
                    }
                    values.push(self.expression(true)?);
                }
                Ok(StmtKind::Print(values))
            }
            "block" => {
                let name = self.expect_name()?;
                let scoped = self.skip_name("scoped");
                self.skip_name("required");
                let (body, _) = self.body("block", &["endblock"])?;
                self.skip_name(name);
                Ok(StmtKind::Block(scoped, body))
            }
            "autoescape" => {
                let value = self.expression(true)?;
                if !matches!(value, Expr::Const(crate::ast::Const::Bool(false))) {
                    return unsupported(line, "HTML escapes ({% autoescape %})");
                }
                let (body, _) = self.body("autoescape", &["endautoescape"])?;
                Ok(StmtKind::Scope(body))
            }
            "break" | "continue" if self.loops == 0 => {
                self.fail(format!("'{name}' outside of a loop"))
            }
            "break" => Ok(StmtKind::Break),
            "continue" => Ok(StmtKind::Continue),
            "include" | "import" | "from" | "extends" => {
                let what = format!("'{name}': a chat template has no other templates to reach");
                Err(Error::new(ErrorKind::Security, what).on_line(line))
            }
            other => {
                let other: String = other.chars().take(60).collect();
                let within = match self.open.last() {
                    Some(open) => format!(" (inside '{open}')"),
                    None => String::new(),
                };
                let what = format!("unknown tag '{other}'{within}");
                Err(Error::new(ErrorKind::Syntax, what).on_line(line))
            }
        }
    }

    fn set(&mut self) -> Result<StmtKind> {
        let target = self.target(&[], true)?;
        if self.skip_op("=") {
            return Ok(StmtKind::Set(target, self.tuple(true, &[], false)?));
        }
        let filters = self.filters(false)?;
        let (body, _) = self.body("set", &["endset"])?;
        Ok(StmtKind::SetBlock(target, filters, body))
    }

    fn for_loop(&mut self) -> Result<StmtKind> {
        let target = self.target(&["in"], false)?;
        if !self.skip_name("in") {
            return self.fail(format!("expected 'in', got {}", self.described()));
        }
        let iter = self.tuple(false, &["recursive"], false)?;
        let filter = if self.skip_name("if") { Some(self.expression(true)?) } else { None };
        let recursive = self.skip_name("recursive");
        self.loops += 1;
        let (body, end) = self.body("for", &["endfor", "else"])?;
        self.loops -= 1;
        let otherwise = match end {
            "else" => self.body("for", &["endfor"])?.0,
            _ => Vec::new(),
        };
        Ok(StmtKind::For(For { target, iter, filter, recursive, body, otherwise }))
    }

    fn conditional(&mut self) -> Result<StmtKind> {
        let mut branches = Vec::new();
        loop {
            let test = self.tuple(false, &[], false)?;
            let (body, end) = self.body("if", &["elif", "else", "endif"])?;
            branches.push((test, body));
            match end {
                "elif" => {}
                "else" => {
                    let (otherwise, _) = self.body("if", &["endif"])?;
                    return Ok(StmtKind::If(branches, otherwise));
                }
                _ => return Ok(StmtKind::If(branches, Vec::new())),
            }
        }
    }

    fn with(&mut self) -> Result<StmtKind> {
        let mut values = Vec::new();
        while *self.peek() != Tok::BlockEnd {
            if !values.is_empty() {
                self.expect_op(",")?;
            }
            let target = self.target(&[], false)?;
            self.expect_op("=")?;
            values.push((target, self.expression(true)?));
        }
        let (body, _) = self.body("with", &["endwith"])?;
        Ok(StmtKind::With(values, body))
    }

    fn signature(&mut self) -> Result<Vec<(String, Option<Expr>)>> {
        self.expect_op("(")?;
        let mut parameters: Vec<(String, Option<Expr>)> = Vec::new();
        while !self.is_op(")") {
            if !parameters.is_empty() {
                self.expect_op(",")?;
            }
            let name = self.expect_name()?.to_owned();
            let default = if self.skip_op("=") { Some(self.expression(true)?) } else { None };
            if default.is_none() && parameters.iter().any(|(_, default)| default.is_some()) {
                return self.fail("a parameter without a default follows one with a default");
            }
            parameters.push((name, default));
        }
        self.expect_op(")")?;
        Ok(parameters)
    }

    /// What is assigned to: a name, several, or with `namespaces` an attribute of one.
    fn target(&mut self, ends: &[&str], namespaces: bool) -> Result<Target> {
        let mut targets = Vec::new();
        let mut is_tuple = false;
        loop {
            if self.at_end_of_list(ends) {
                break;
            }
            targets.push(self.single_target(namespaces)?);
            if !self.is_op(",") {
                break;
            }
            self.next();
            is_tuple = true;
        }
        match (targets.pop(), is_tuple) {
            (Some(target), false) => Ok(target),
            (Some(target), true) => {
                targets.push(target);
                Ok(Target::Tuple(targets))
            }
            (None, _) => self.fail(format!("expected a name, got {}", self.described())),
        }
    }

    fn single_target(&mut self, namespaces: bool) -> Result<Target> {
        if self.skip_op("(") {
            let target = self.nested(|parser| parser.target(&[], namespaces))?;
            self.expect_op(")")?;
            return Ok(target);
        }
        let name = self.expect_name()?;
        if matches!(name, "true" | "false" | "none" | "True" | "False" | "None") {
            return self.fail(format!("cannot assign to {name}"));
        }
        if name == "loop" && self.loops > 0 {
            return self.fail("cannot assign to 'loop' inside of a loop");
        }
        if namespaces && self.skip_op(".") {
            let attribute = self.expect_name()?;
            return Ok(Target::Namespace(name.to_owned(), attribute.to_owned()));
        }
        Ok(Target::Name(name.to_owned()))
    }
}

fn new_macro(
    name: Option<String>,
    parameters: Vec<(String, Option<Expr>)>,
    body: Vec<Stmt>,
) -> Macro {
    let [takes_varargs, takes_kwargs, takes_caller] =
        mentions(&body, ["varargs", "kwargs", "caller"]);
    Macro { name, parameters, body, takes_varargs, takes_kwargs, takes_caller }
}

fn unsupported<T>(line: u32, what: &str) -> Result<T> {
    Err(Error::new(ErrorKind::Unsupported, format!("{what} are not supported")).on_line(line))
}

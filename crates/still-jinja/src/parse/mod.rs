//! Source to statements, as Jinja2's parser.

mod escapes;
mod expressions;
mod lexer;
mod names;
mod statements;

use crate::MAX_NESTING;
use crate::ast::Stmt;
use crate::error::{Error, ErrorKind, Result};
use lexer::{Tok, Token};

pub(crate) fn parse(source: &str) -> Result<Vec<Stmt>> {
    let source = lexer::normalize(source);
    let tokens = lexer::tokenize(&source)?;
    let mut parser = Parser { tokens: &tokens, at: 0, depth: 0, open: Vec::new(), loops: 0 };
    parser.statements(&[])
}

struct Parser<'s> {
    tokens: &'s [Token<'s>],
    at: usize,
    depth: usize,
    /// Tags that are open, for the words of errors.
    open: Vec<&'static str>,
    /// Loops that a `break` would end.
    loops: usize,
}

impl<'s> Parser<'s> {
    fn peek(&self) -> &'s Tok<'s> {
        &self.tokens[self.at].tok
    }

    /// The token after the next.
    fn look(&self) -> &'s Tok<'s> {
        &self.tokens[(self.at + 1).min(self.tokens.len() - 1)].tok
    }

    fn line(&self) -> u32 {
        self.tokens[self.at].line
    }

    fn next(&mut self) -> &'s Tok<'s> {
        let token = &self.tokens[self.at].tok;
        if self.at + 1 < self.tokens.len() {
            self.at += 1;
        }
        token
    }

    fn fail<T>(&self, message: impl Into<String>) -> Result<T> {
        Err(Error::new(ErrorKind::Syntax, message).on_line(self.line()))
    }

    fn is_name(&self, name: &str) -> bool {
        matches!(self.peek(), Tok::Name(found) if *found == name)
    }

    fn is_op(&self, op: &str) -> bool {
        matches!(self.peek(), Tok::Op(found) if *found == op)
    }

    fn skip_name(&mut self, name: &str) -> bool {
        let found = self.is_name(name);
        if found {
            self.next();
        }
        found
    }

    fn skip_op(&mut self, op: &str) -> bool {
        let found = self.is_op(op);
        if found {
            self.next();
        }
        found
    }

    fn expect_op(&mut self, op: &str) -> Result<()> {
        if self.skip_op(op) {
            return Ok(());
        }
        self.fail(format!("expected '{op}', got {}", self.described()))
    }

    fn expect_name(&mut self) -> Result<&'s str> {
        match self.peek() {
            Tok::Name(name) => {
                self.next();
                Ok(name)
            }
            _ => self.fail(format!("expected a name, got {}", self.described())),
        }
    }

    fn expect(&mut self, tok: &Tok<'_>) -> Result<()> {
        if self.peek() == tok {
            self.next();
            return Ok(());
        }
        self.fail(format!("expected {}, got {}", describe(tok), self.described()))
    }

    fn described(&self) -> String {
        describe(self.peek())
    }

    /// Runs `work` one level deeper.
    fn nested<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if self.depth == MAX_NESTING {
            let what = format!("nests deeper than {MAX_NESTING} levels");
            return Err(Error::new(ErrorKind::Limit, what).on_line(self.line()));
        }
        self.depth += 1;
        let result = work(self);
        self.depth -= 1;
        result
    }
}

fn describe(tok: &Tok<'_>) -> String {
    match tok {
        Tok::Data(_) => "text".into(),
        Tok::VariableBegin => "'{{'".into(),
        Tok::VariableEnd => "'}}'".into(),
        Tok::BlockBegin => "'{%'".into(),
        Tok::BlockEnd => "'%}'".into(),
        Tok::Name(name) => format!("'{}'", name.chars().take(60).collect::<String>()),
        Tok::Str(_) => "a string".into(),
        Tok::Int(_) | Tok::Float(_) => "a number".into(),
        Tok::Op(op) => format!("'{op}'"),
        Tok::Eof => "the end of the template".into(),
    }
}

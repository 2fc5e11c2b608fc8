//! Expressions, from the loosest operator to the tightest.

use super::Parser;
use super::lexer::Tok;
use crate::ast::{Args, Comparison, Const, Expr, MathOp, Post};
use crate::error::Result;

impl Parser<'_> {
    /// Whether no other item of a list without brackets follows: at the end of a tag or group, or a name that ends it.
    pub(super) fn at_end_of_list(&self, ends: &[&str]) -> bool {
        matches!(self.peek(), Tok::BlockEnd | Tok::VariableEnd)
            || self.is_op(")")
            || matches!(self.peek(), Tok::Name(name) if ends.contains(name))
    }

    /// One expression or, where commas follow, several as a tuple.
    pub(super) fn tuple(
        &mut self,
        conditional: bool,
        ends: &[&str],
        parenthesized: bool,
    ) -> Result<Expr> {
        let mut items = Vec::new();
        let mut is_tuple = false;
        loop {
            if self.at_end_of_list(ends) {
                break;
            }
            items.push(self.expression(conditional)?);
            if !self.skip_op(",") {
                break;
            }
            is_tuple = true;
        }
        if is_tuple || (items.is_empty() && parenthesized) {
            return Ok(Expr::Tuple(items));
        }
        match items.pop() {
            Some(item) => Ok(item),
            None => self.fail(format!("expected an expression, got {}", self.described())),
        }
    }

    pub(super) fn expression(&mut self, conditional: bool) -> Result<Expr> {
        self.nested(|parser| if conditional { parser.conditional_expr() } else { parser.or() })
    }

    fn conditional_expr(&mut self) -> Result<Expr> {
        let mut value = self.or()?;
        // `a if b if c`: each wraps what was there, so it nests as if it were written so.
        let mut chained = 0;
        while self.skip_name("if") {
            chained += 1;
            if chained + self.depth > crate::MAX_NESTING {
                return self.fail("too many conditions in a row");
            }
            let test = self.or()?;
            let otherwise =
                if self.skip_name("else") { Some(self.expression(true)?) } else { None };
            value = Expr::Cond(Box::new((test, value, otherwise)));
        }
        Ok(value)
    }

    fn or(&mut self) -> Result<Expr> {
        let first = self.and()?;
        let mut all = vec![first];
        while self.skip_name("or") {
            all.push(self.and()?);
        }
        Ok(single(all, Expr::Or))
    }

    fn and(&mut self) -> Result<Expr> {
        let mut all = vec![self.not()?];
        while self.skip_name("and") {
            all.push(self.not()?);
        }
        Ok(single(all, Expr::And))
    }

    fn not(&mut self) -> Result<Expr> {
        if self.skip_name("not") {
            return Ok(Expr::Not(Box::new(self.nested(Self::not)?)));
        }
        self.comparison()
    }

    fn comparison(&mut self) -> Result<Expr> {
        let first = self.sum()?;
        let mut rest = Vec::new();
        loop {
            let comparison = match self.peek() {
                Tok::Op("==") => Comparison::Eq,
                Tok::Op("!=") => Comparison::Ne,
                Tok::Op("<") => Comparison::Lt,
                Tok::Op("<=") => Comparison::Le,
                Tok::Op(">") => Comparison::Gt,
                Tok::Op(">=") => Comparison::Ge,
                Tok::Name("in") => Comparison::In,
                Tok::Name("not") if matches!(self.look(), Tok::Name("in")) => {
                    self.next();
                    Comparison::NotIn
                }
                _ => break,
            };
            self.next();
            rest.push((comparison, self.sum()?));
        }
        Ok(if rest.is_empty() { first } else { Expr::Compare(Box::new(first), rest) })
    }

    fn chain(
        &mut self,
        operand: fn(&mut Self) -> Result<Expr>,
        operators: &[(&str, MathOp)],
    ) -> Result<Expr> {
        let first = operand(self)?;
        let mut rest = Vec::new();
        while let Some(&(_, op)) = operators.iter().find(|(op, _)| self.is_op(op)) {
            self.next();
            rest.push((op, operand(self)?));
        }
        Ok(if rest.is_empty() { first } else { Expr::Math(Box::new(first), rest) })
    }

    fn sum(&mut self) -> Result<Expr> {
        self.chain(Self::concat, &[("+", MathOp::Add), ("-", MathOp::Sub)])
    }

    fn concat(&mut self) -> Result<Expr> {
        let mut all = vec![self.product()?];
        while self.skip_op("~") {
            all.push(self.product()?);
        }
        Ok(single(all, Expr::Concat))
    }

    fn product(&mut self) -> Result<Expr> {
        let operators =
            [("*", MathOp::Mul), ("/", MathOp::Div), ("//", MathOp::FloorDiv), ("%", MathOp::Mod)];
        self.chain(Self::power, &operators)
    }

    fn power(&mut self) -> Result<Expr> {
        self.chain(|parser| parser.unary(true), &[("**", MathOp::Pow)])
    }

    fn unary(&mut self, with_filter: bool) -> Result<Expr> {
        let value = if self.skip_op("-") {
            Expr::Neg(Box::new(self.nested(|parser| parser.unary(false))?))
        } else if self.skip_op("+") {
            Expr::Pos(Box::new(self.nested(|parser| parser.unary(false))?))
        } else {
            self.primary()?
        };
        let mut posts = self.postfix()?;
        if with_filter {
            loop {
                if self.is_op("|") {
                    posts.extend(self.filters(false)?);
                } else if self.is_name("is") {
                    posts.push(self.test()?);
                } else if self.is_op("(") {
                    posts.push(Post::Call(self.call_args()?));
                } else {
                    break;
                }
            }
        }
        Ok(if posts.is_empty() { value } else { Expr::Postfix(Box::new(value), posts) })
    }

    fn primary(&mut self) -> Result<Expr> {
        match self.peek() {
            Tok::Name(name) => {
                self.next();
                Ok(match *name {
                    "true" | "True" => Expr::Const(Const::Bool(true)),
                    "false" | "False" => Expr::Const(Const::Bool(false)),
                    "none" | "None" => Expr::Const(Const::None),
                    name => Expr::Name(name.to_owned()),
                })
            }
            Tok::Str(first) => {
                let mut text = first.clone();
                self.next();
                while let Tok::Str(more) = self.peek() {
                    text.push_str(more);
                    self.next();
                }
                Ok(Expr::Const(Const::Str(text.into())))
            }
            Tok::Int(value) => {
                self.next();
                Ok(Expr::Const(Const::Int(*value)))
            }
            Tok::Float(value) => {
                self.next();
                Ok(Expr::Const(Const::Float(*value)))
            }
            Tok::Op("(") => {
                self.next();
                let value = self.tuple(true, &[], true)?;
                self.expect_op(")")?;
                Ok(value)
            }
            Tok::Op("[") => {
                self.next();
                let mut items = Vec::new();
                while !self.is_op("]") {
                    items.push(self.expression(true)?);
                    if !self.skip_op(",") {
                        break;
                    }
                }
                self.expect_op("]")?;
                Ok(Expr::List(items))
            }
            Tok::Op("{") => {
                self.next();
                let mut items = Vec::new();
                while !self.is_op("}") {
                    let key = self.expression(true)?;
                    self.expect_op(":")?;
                    items.push((key, self.expression(true)?));
                    if !self.skip_op(",") {
                        break;
                    }
                }
                self.expect_op("}")?;
                Ok(Expr::Dict(items))
            }
            _ => self.fail(format!("unexpected {}", self.described())),
        }
    }

    fn postfix(&mut self) -> Result<Vec<Post>> {
        let mut posts = Vec::new();
        loop {
            if self.skip_op(".") {
                match self.next() {
                    Tok::Name(name) => posts.push(Post::Attr((*name).to_owned())),
                    Tok::Int(index) => posts.push(Post::Item(Expr::Const(Const::Int(*index)))),
                    _ => return self.fail("expected a name or number after '.'"),
                }
            } else if self.skip_op("[") {
                posts.push(self.subscript()?);
            } else if self.is_op("(") {
                posts.push(Post::Call(self.call_args()?));
            } else {
                return Ok(posts);
            }
        }
    }

    fn subscript(&mut self) -> Result<Post> {
        let mut items = Vec::new();
        while !self.is_op("]") {
            if !items.is_empty() {
                self.expect_op(",")?;
            }
            let start = if self.is_op(":") { None } else { Some(self.expression(true)?) };
            if !self.skip_op(":") {
                items.extend(start);
                continue;
            }
            let ends = |parser: &Self| parser.is_op("]") || parser.is_op(",");
            let stop =
                if self.is_op(":") || ends(self) { None } else { Some(self.expression(true)?) };
            let step =
                if self.skip_op(":") && !ends(self) { Some(self.expression(true)?) } else { None };
            // A tuple of slices is an index that no Python type here has.
            self.expect_op("]")?;
            if !items.is_empty() {
                return self.fail("a slice beside other indexes");
            }
            return Ok(Post::Slice(Box::new([start, stop, step])));
        }
        self.expect_op("]")?;
        Ok(Post::Item(single(items, Expr::Tuple)))
    }

    fn call_args(&mut self) -> Result<Args> {
        self.expect_op("(")?;
        let mut args = Args::default();
        let misplaced = "invalid order of arguments in a call";
        while !self.is_op(")") {
            if self.skip_op("*") {
                if args.star.is_some() || args.star_star.is_some() {
                    return self.fail(misplaced);
                }
                args.star = Some(Box::new(self.expression(true)?));
            } else if self.skip_op("**") {
                if args.star_star.is_some() {
                    return self.fail(misplaced);
                }
                args.star_star = Some(Box::new(self.expression(true)?));
            } else if let (Tok::Name(name), Tok::Op("=")) = (self.peek(), self.look()) {
                if args.star_star.is_some() {
                    return self.fail(misplaced);
                }
                self.next();
                self.next();
                args.keywords.push(((*name).to_owned(), self.expression(true)?));
            } else {
                if args.star.is_some() || args.star_star.is_some() || !args.keywords.is_empty() {
                    return self.fail(misplaced);
                }
                args.positional.push(self.expression(true)?);
            }
            if !self.skip_op(",") {
                break;
            }
        }
        self.expect_op(")")?;
        Ok(args)
    }

    /// Filters after `|`; with `inline`, the first is there without it.
    pub(super) fn filters(&mut self, mut inline: bool) -> Result<Vec<Post>> {
        let mut filters = Vec::new();
        while inline || self.skip_op("|") {
            inline = false;
            let name = self.dotted()?;
            let args = if self.is_op("(") { self.call_args()? } else { Args::default() };
            filters.push(Post::Filter(name, args));
        }
        Ok(filters)
    }

    fn test(&mut self) -> Result<Post> {
        self.next();
        let negated = self.skip_name("not");
        let name = self.dotted()?;
        let mut args = Args::default();
        if self.is_op("(") {
            args = self.call_args()?;
        } else {
            let takes = match self.peek() {
                Tok::Name(word) => !matches!(*word, "else" | "or" | "and"),
                Tok::Str(_) | Tok::Int(_) | Tok::Float(_) => true,
                Tok::Op(op) => matches!(*op, "[" | "{"),
                _ => false,
            };
            if takes {
                if self.is_name("is") {
                    return self.fail("tests cannot be chained with 'is'");
                }
                let value = self.primary()?;
                let posts = self.postfix()?;
                args.positional.push(if posts.is_empty() {
                    value
                } else {
                    Expr::Postfix(Box::new(value), posts)
                });
            }
        }
        Ok(Post::Test { name, args, negated })
    }

    fn dotted(&mut self) -> Result<String> {
        let mut name = self.expect_name()?.to_owned();
        while self.skip_op(".") {
            name.push('.');
            name.push_str(self.expect_name()?);
        }
        Ok(name)
    }
}

/// The only one, or all together.
fn single(mut all: Vec<Expr>, together: fn(Vec<Expr>) -> Expr) -> Expr {
    match (all.len(), all.pop()) {
        (1, Some(only)) => only,
        (_, last) => {
            all.extend(last);
            together(all)
        }
    }
}

//! Which names a macro's body uses.

use crate::ast::{Args, Expr, Post, Stmt, StmtKind};

/// For each name, whether the statements load it.
pub(super) fn mentions<const N: usize>(body: &[Stmt], names: [&str; N]) -> [bool; N] {
    let mut found = [false; N];
    statements(body, &mut |name| {
        for (found, wanted) in found.iter_mut().zip(names) {
            *found |= name == wanted;
        }
    });
    found
}

type Each<'a> = &'a mut dyn FnMut(&str);

fn statements(body: &[Stmt], each: Each<'_>) {
    for stmt in body {
        match &stmt.kind {
            StmtKind::Data(_) | StmtKind::Break | StmtKind::Continue => {}
            StmtKind::Print(values) => values.iter().for_each(|value| expression(value, each)),
            StmtKind::Set(_, value) => expression(value, each),
            StmtKind::SetBlock(_, posts, body) | StmtKind::Filter(posts, body) => {
                posts.iter().for_each(|after| post(after, each));
                statements(body, each);
            }
            StmtKind::For(inner) => {
                expression(&inner.iter, each);
                inner.filter.iter().for_each(|value| expression(value, each));
                statements(&inner.body, each);
                statements(&inner.otherwise, each);
            }
            StmtKind::If(branches, otherwise) => {
                for (test, body) in branches {
                    expression(test, each);
                    statements(body, each);
                }
                statements(otherwise, each);
            }
            StmtKind::With(values, body) => {
                values.iter().for_each(|(_, value)| expression(value, each));
                statements(body, each);
            }
            StmtKind::Macro(inner) => statements(&inner.body, each),
            StmtKind::Call(inner, call) => {
                expression(call, each);
                statements(&inner.body, each);
            }
            StmtKind::Generation(body) | StmtKind::Block(_, body) | StmtKind::Scope(body) => {
                statements(body, each);
            }
        }
    }
}

fn expression(value: &Expr, each: Each<'_>) {
    match value {
        Expr::Const(_) => {}
        Expr::Name(name) => each(name),
        Expr::Tuple(all) | Expr::List(all) | Expr::Or(all) | Expr::And(all) | Expr::Concat(all) => {
            all.iter().for_each(|value| expression(value, each));
        }
        Expr::Dict(all) => all.iter().for_each(|(key, value)| {
            expression(key, each);
            expression(value, each);
        }),
        Expr::Cond(parts) => {
            expression(&parts.0, each);
            expression(&parts.1, each);
            parts.2.iter().for_each(|value| expression(value, each));
        }
        Expr::Not(inner) | Expr::Neg(inner) | Expr::Pos(inner) => expression(inner, each),
        Expr::Compare(first, rest) => {
            expression(first, each);
            rest.iter().for_each(|(_, value)| expression(value, each));
        }
        Expr::Math(first, rest) => {
            expression(first, each);
            rest.iter().for_each(|(_, value)| expression(value, each));
        }
        Expr::Postfix(first, posts) => {
            expression(first, each);
            posts.iter().for_each(|after| post(after, each));
        }
    }
}

fn post(after: &Post, each: Each<'_>) {
    match after {
        Post::Attr(_) => {}
        Post::Item(value) => expression(value, each),
        Post::Slice(parts) => parts.iter().flatten().for_each(|value| expression(value, each)),
        Post::Call(args) | Post::Filter(_, args) | Post::Test { args, .. } => arguments(args, each),
    }
}

fn arguments(args: &Args, each: Each<'_>) {
    args.positional.iter().for_each(|value| expression(value, each));
    args.keywords.iter().for_each(|(_, value)| expression(value, each));
    args.star.iter().for_each(|value| expression(value, each));
    args.star_star.iter().for_each(|value| expression(value, each));
}

//! What a source says. Chains (`a + b + c`, `a.b.c`, `a | f | g`) are flat, so that only what is nested as it is
//! written is nested here.

use std::sync::Arc;

#[derive(Debug)]
pub(crate) struct Stmt {
    pub line: u32,
    pub kind: StmtKind,
}

#[derive(Debug)]
pub(crate) enum StmtKind {
    Data(String),
    Print(Vec<Expr>),
    Set(Target, Expr),
    SetBlock(Target, Vec<Post>, Vec<Stmt>),
    For(For),
    If(Vec<(Expr, Vec<Stmt>)>, Vec<Stmt>),
    With(Vec<(Target, Expr)>, Vec<Stmt>),
    Macro(Macro),
    /// The body of a call block is a macro without a name.
    Call(Macro, Expr),
    Filter(Vec<Post>, Vec<Stmt>),
    Generation(Vec<Stmt>),
    /// Whether it sees the variables around it.
    Block(bool, Vec<Stmt>),
    Scope(Vec<Stmt>),
    Break,
    Continue,
}

#[derive(Debug)]
pub(crate) struct For {
    pub target: Target,
    pub iter: Expr,
    pub filter: Option<Expr>,
    pub recursive: bool,
    pub body: Vec<Stmt>,
    pub otherwise: Vec<Stmt>,
}

#[derive(Debug)]
pub(crate) struct Macro {
    pub name: Option<String>,
    pub parameters: Vec<(String, Option<Expr>)>,
    pub body: Vec<Stmt>,
    /// Whether the body names `varargs`, `kwargs` or `caller`: only then may a call give them.
    pub takes_varargs: bool,
    pub takes_kwargs: bool,
    pub takes_caller: bool,
}

#[derive(Debug)]
pub(crate) enum Target {
    Name(String),
    Namespace(String, String),
    Tuple(Vec<Target>),
}

#[derive(Debug)]
pub(crate) enum Expr {
    Const(Const),
    Name(String),
    Tuple(Vec<Expr>),
    List(Vec<Expr>),
    Dict(Vec<(Expr, Expr)>),
    /// Test, value, other value.
    Cond(Box<(Expr, Expr, Option<Expr>)>),
    Or(Vec<Expr>),
    And(Vec<Expr>),
    Not(Box<Expr>),
    Compare(Box<Expr>, Vec<(Comparison, Expr)>),
    Math(Box<Expr>, Vec<(MathOp, Expr)>),
    Concat(Vec<Expr>),
    Neg(Box<Expr>),
    Pos(Box<Expr>),
    Postfix(Box<Expr>, Vec<Post>),
}

#[derive(Clone, Debug)]
pub(crate) enum Const {
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Str(Arc<str>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Comparison {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    In,
    NotIn,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MathOp {
    Add,
    Sub,
    Mul,
    Div,
    FloorDiv,
    Mod,
    Pow,
}

/// What follows a value.
#[derive(Debug)]
pub(crate) enum Post {
    Attr(String),
    Item(Expr),
    Slice(Box<[Option<Expr>; 3]>),
    Call(Args),
    Filter(String, Args),
    Test { name: String, args: Args, negated: bool },
}

#[derive(Debug, Default)]
pub(crate) struct Args {
    pub positional: Vec<Expr>,
    pub keywords: Vec<(String, Expr)>,
    pub star: Option<Box<Expr>>,
    pub star_star: Option<Box<Expr>>,
}

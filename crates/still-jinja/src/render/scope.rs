//! Variables: each block sees those around it and sets its own.

use std::cell::RefCell;
use std::rc::Rc;

use crate::python::value::Value;

#[derive(Debug)]
pub(super) struct Scope<'t> {
    parent: Option<Rc<Scope<'t>>>,
    variables: RefCell<Vec<(&'t str, Value)>>,
}

impl<'t> Scope<'t> {
    /// The outermost, with what the template is given.
    pub fn root(given: Vec<(&'t str, Value)>) -> Rc<Self> {
        Rc::new(Self { parent: None, variables: RefCell::new(given) })
    }

    pub fn inside(parent: &Rc<Self>) -> Rc<Self> {
        Rc::new(Self { parent: Some(parent.clone()), variables: RefCell::new(Vec::new()) })
    }

    pub fn set(&self, name: &'t str, value: Value) {
        let mut variables = self.variables.borrow_mut();
        match variables.iter_mut().find(|(known, _)| *known == name) {
            Some((_, place)) => *place = value,
            None => variables.push((name, value)),
        }
    }

    /// A variable and how many were looked at.
    pub fn get(&self, name: &str) -> (Option<Value>, usize) {
        let mut scope = Some(self);
        let mut looked = 0;
        while let Some(here) = scope {
            let variables = here.variables.borrow();
            looked += variables.len();
            if let Some((_, value)) = variables.iter().find(|(known, _)| *known == name) {
                return (Some(value.clone()), looked);
            }
            scope = here.parent.as_deref();
        }
        (None, looked)
    }
}

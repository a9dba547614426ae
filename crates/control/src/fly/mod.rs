//! Machines as Fly's clients write and read them: between their JSON and [`dunlin_model::MachineSpec`].
//!
//! What is not understood is refused by its path, never dropped; so is what is understood and cannot be honoured. A field
//! that says nothing (`null`, `false`, `0`, an empty text, list or object) is as good as none: clients send all they know.

mod disk;
mod fields;
mod programs;
mod read;
mod show;
#[cfg(test)]
mod tests;
mod time;

pub(crate) use fields::Fields;
#[cfg(test)]
pub(crate) use fields::asked::asked_for;
pub(crate) use read::{Asked, Named, metadata, read};
pub(crate) use show::{events, show};
pub(crate) use time::rfc3339;

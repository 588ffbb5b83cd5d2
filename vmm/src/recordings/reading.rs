//! Whether a type of ours can read what a schema says will come: it is read from the schema
//! itself, with a value made up for each member. So the fields that a type reads are known without
//! a list of them.

use std::cell::RefCell;

use serde::de::value::{Error, MapDeserializer, SeqDeserializer};
use serde::de::{DeserializeOwned, Deserializer, Error as _, IntoDeserializer, Visitor};
use serde::forward_to_deserialize_any;
use serde_json::Value;

use super::schema::{Schema, is_mandatory, list, text};

/// What `T` reads that a `typename` has not, or may not have; each line begins with `at`.
pub(super) fn unread<T: DeserializeOwned>(
    schema: &Schema,
    typename: &str,
    at: &str,
) -> Vec<String> {
    let wrong = RefCell::new(Vec::new());
    for sparse in [false, true] {
        let made_up = MadeUp {
            schema,
            entity: schema.entity(typename),
            sparse,
            at,
            wrong: &wrong,
        };
        if let Err(error) = T::deserialize(made_up) {
            let often = if sparse { " at times" } else { "" };
            wrong
                .borrow_mut()
                .push(format!("{at} is not understood{often}: {error}"));
        }
    }
    let mut wrong = wrong.into_inner();
    wrong.dedup();
    wrong
}

/// A value of a type.
#[derive(Clone, Copy)]
struct MadeUp<'a> {
    schema: &'a Schema,
    entity: &'a Value,
    /// Without what is optional.
    sparse: bool,
    at: &'a str,
    wrong: &'a RefCell<Vec<String>>,
}

impl<'a> MadeUp<'a> {
    /// Members that come, of those that are asked for.
    fn members(&self, wanted: impl Fn(&str) -> bool) -> Vec<(String, MadeUp<'a>)> {
        let members = list(&self.entity["members"]).iter();
        let members = members.filter(|member| is_mandatory(member) || !self.sparse);
        members
            .map(|member| {
                let entity = self
                    .schema
                    .entity(member["type"].as_str().unwrap_or_default());
                (text(&member["name"]), MadeUp { entity, ..*self })
            })
            .filter(|(name, _)| wanted(name))
            .collect()
    }
}

impl<'de> Deserializer<'de> for MadeUp<'_> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let entity = self.entity;
        match entity["meta-type"].as_str().unwrap_or_default() {
            "builtin" => match entity["json-type"].as_str().unwrap_or_default() {
                "string" => visitor.visit_str("text"),
                "int" => visitor.visit_u64(1),
                "number" => visitor.visit_f64(1.0),
                "boolean" => visitor.visit_bool(true),
                _ => visitor.visit_unit(),
            },
            "enum" => visitor.visit_str("text"),
            "array" => {
                let of = entity["element-type"].as_str().unwrap_or_default();
                let entity = self.schema.entity(of);
                let one = MadeUp { entity, ..self };
                visitor.visit_seq(SeqDeserializer::new(std::iter::once(one)))
            }
            "object" => visitor.visit_map(MapDeserializer::new(self.members(|_| true).into_iter())),
            other => Err(Error::custom(format!("the test reads no {other:?} yet"))),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let members = list(&self.entity["members"]);
        for field in fields {
            if !members.iter().any(|member| member["name"] == **field) {
                let wrong = format!("{} has no {field}", self.at);
                self.wrong.borrow_mut().push(wrong);
            }
        }
        let read = self.members(|name| fields.contains(&name));
        visitor.visit_map(MapDeserializer::new(read.into_iter()))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_unit()
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier
    }
}

impl<'de> IntoDeserializer<'de, Error> for MadeUp<'_> {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

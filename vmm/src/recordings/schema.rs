//! QEMU's own description of its monitor (`query-qmp-schema`), and whether a value fits it.

use std::collections::HashMap;

use serde_json::{Map, Value};

/// The entities of a schema, by name. Types have numbers for names.
#[derive(Clone, Debug)]
pub(super) struct Schema(HashMap<String, Value>);

impl Schema {
    pub(super) fn of(entities: &[Value]) -> Schema {
        let named = |entity: &Value| (text(&entity["name"]), entity.clone());
        Schema(entities.iter().map(named).collect())
    }

    /// An entity of this kind: a command, an event.
    pub(super) fn find(&self, kind: &str, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|found| found["meta-type"] == kind)
    }

    pub(super) fn commands(&self) -> impl Iterator<Item = &str> {
        let commands = self.0.values().filter(|one| one["meta-type"] == "command");
        commands.filter_map(|command| command["name"].as_str())
    }

    pub(super) fn entity(&self, name: &str) -> &Value {
        self.0.get(name).unwrap_or(&Value::Null)
    }

    /// What is wrong with `value` as one of `typename`; each line begins with `at`.
    pub(super) fn check(&self, typename: &str, value: &Value, at: &str) -> Vec<String> {
        let entity = self.entity(typename);
        let fits = match entity["meta-type"].as_str().unwrap_or_default() {
            "builtin" => is_kind(&entity["json-type"], value),
            "enum" => value.as_str().is_some_and(|name| has_value(entity, name)),
            "array" => {
                let Some(items) = value.as_array() else {
                    return vec![format!("{at} is a list, not {value}")];
                };
                let of = text(&entity["element-type"]);
                return items
                    .iter()
                    .flat_map(|item| self.check(&of, item, at))
                    .collect();
            }
            "object" => {
                return match value {
                    Value::Object(fields) => self.check_object(entity, fields, at),
                    other => vec![format!("{at} is an object, not {other}")],
                };
            }
            "alternate" => {
                let of = list(&entity["members"])
                    .iter()
                    .map(|one| text(&one["type"]));
                let tried: Vec<_> = of.map(|of| (self.check(&of, value, at), of)).collect();
                // Of several, the one that is meant tells more than that none fits.
                let meant =
                    |of: &str| value.is_object() == (self.entity(of)["meta-type"] == "object");
                let mut meant = tried.iter().filter(|(_, of)| meant(of));
                let fits = tried.iter().any(|(wrong, _)| wrong.is_empty());
                match meant.next() {
                    Some((wrong, _)) if !fits && value.is_object() => return wrong.clone(),
                    _ => fits,
                }
            }
            _ => return vec![format!("{at} has a type that is not in the recording")],
        };
        match fits {
            true => Vec::new(),
            false => vec![format!("{at} cannot be {value}")],
        }
    }

    fn check_object(&self, entity: &Value, fields: &Map<String, Value>, at: &str) -> Vec<String> {
        let mut members: Vec<&Value> = list(&entity["members"]).iter().collect();
        if let Some(tag) = entity["tag"].as_str() {
            let chosen = fields.get(tag).unwrap_or(&Value::Null);
            let variants = list(&entity["variants"]).iter();
            let variant = variants.filter(|one| one["case"] == *chosen);
            let of = variant.map(|one| self.entity(one["type"].as_str().unwrap_or_default()));
            members.extend(of.flat_map(|variant| list(&variant["members"])));
        }
        let mut wrong = Vec::new();
        for (name, value) in fields {
            match members.iter().find(|member| member["name"] == **name) {
                Some(member) => {
                    let at = format!("{at} {name}");
                    wrong.extend(self.check(&text(&member["type"]), value, &at));
                }
                None => wrong.push(format!("{at} has no {name}")),
            }
        }
        for member in members.iter().filter(|member| is_mandatory(member)) {
            let name = text(&member["name"]);
            if !fields.contains_key(&name) {
                wrong.push(format!("{at} cannot be without {name}"));
            }
        }
        wrong
    }
}

/// A member is optional if the schema tells its default, which may be null.
pub(super) fn is_mandatory(member: &Value) -> bool {
    member.get("default").is_none()
}

/// Whether an enumeration has this value. Versions before 6.2 list names only.
pub(super) fn has_value(entity: &Value, name: &str) -> bool {
    let names = list(&entity["members"])
        .iter()
        .map(|member| &member["name"]);
    names.chain(list(&entity["values"])).any(|one| one == name)
}

fn is_kind(json_type: &Value, value: &Value) -> bool {
    match json_type.as_str().unwrap_or_default() {
        "string" => value.is_string(),
        "int" => value.is_u64() || value.is_i64(),
        "number" => value.is_number(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "object" => value.is_object(),
        "array" => value.is_array(),
        "value" => true,
        _ => false,
    }
}

pub(super) fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

pub(super) fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

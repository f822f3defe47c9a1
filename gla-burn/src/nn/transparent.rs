//! Modules that are one of several.

/// An enum that is to a module visitor the module inside: parameters have the same paths whatever
/// the variant. A derived `Module` would put the name of the variant into them, and with it into
/// checkpoints and optimizer states.
macro_rules! transparent_module {
    (
        $(#[$outer:meta])*
        pub enum $name:ident { $($(#[$doc:meta])* $variant:ident($inner:ty),)* }
    ) => {
        $(#[$outer])*
        #[derive(Clone, Debug)]
        pub enum $name {
            $($(#[$doc])* $variant($inner),)*
        }

        $(impl From<$inner> for $name {
            fn from(inner: $inner) -> Self {
                Self::$variant(inner)
            }
        })*

        impl burn::module::Module for $name {
            fn collect_devices(&self, devices: burn::module::Devices) -> burn::module::Devices {
                match self {
                    $(Self::$variant(inner) => inner.collect_devices(devices),)*
                }
            }

            fn fork(self, device: &burn::tensor::Device) -> Self {
                match self {
                    $(Self::$variant(inner) => Self::$variant(inner.fork(device)),)*
                }
            }

            fn to_device(self, device: &burn::tensor::Device) -> Self {
                match self {
                    $(Self::$variant(inner) => Self::$variant(inner.to_device(device)),)*
                }
            }

            fn train(self) -> Self {
                match self {
                    $(Self::$variant(inner) => Self::$variant(inner.train()),)*
                }
            }

            fn valid(&self) -> Self {
                match self {
                    $(Self::$variant(inner) => Self::$variant(inner.valid()),)*
                }
            }

            fn materialize(self) -> Self {
                match self {
                    $(Self::$variant(inner) => Self::$variant(inner.materialize()),)*
                }
            }

            fn visit<V: burn::module::ModuleVisitor>(&self, visitor: &mut V) {
                match self {
                    $(Self::$variant(inner) => burn::module::Module::visit(inner, visitor),)*
                }
            }

            fn map<M: burn::module::ModuleMapper>(self, mapper: &mut M) -> Self {
                match self {
                    $(Self::$variant(inner) => Self::$variant(burn::module::Module::map(inner, mapper)),)*
                }
            }
        }

        impl burn::module::ModuleDisplayDefault for $name {
            fn content(&self, content: burn::module::Content) -> Option<burn::module::Content> {
                match self {
                    $(Self::$variant(inner) => content.add_single(inner).optional(),)*
                }
            }

            fn num_params(&self) -> usize {
                burn::module::Module::num_params(self)
            }
        }

        impl burn::module::ModuleDisplay for $name {}
    };
}
pub(super) use transparent_module;

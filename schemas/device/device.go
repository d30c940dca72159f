// Package device holds the device model: what the DeviceModel and Device
// objects say, the resolved device that travels to a node, and the arithmetic of
// property values (value.go).
//
//	var d device.Device
//	err := json.Unmarshal(payload, &d) // fl/<node>/desired/device/<ns>/<name>
//	p, ok := d.Property("speed")
//	v, err := p.Decode(json.RawMessage("40")) // int64(40), or why not
//
// The JSON names are those of the CustomResourceDefinitions in schemas/crd, so
// the same structs read a Kubernetes object's spec and a payload.
package device

import (
	"encoding/json"
	"fmt"
	"time"
)

// Type is a property's type, as written in a DeviceModel.
type Type string

// The property types.
const (
	Bool    Type = "bool"
	Int8    Type = "int8"
	Int16   Type = "int16"
	Int32   Type = "int32"
	Int64   Type = "int64"
	Uint8   Type = "uint8"
	Uint16  Type = "uint16"
	Uint32  Type = "uint32"
	Uint64  Type = "uint64"
	Float32 Type = "float32"
	Float64 Type = "float64"
	String  Type = "string"
	Bytes   Type = "bytes" // base64 on the wire
	JSON    Type = "json"
)

// Access says who may do what with a property.
type Access string

// The access modes: read only (the default), write only, read and write.
const (
	ReadOnly  Access = "ro"
	WriteOnly Access = "wo"
	ReadWrite Access = "rw"
)

// Readable tells whether a mapper reads the property.
func (a Access) Readable() bool { return a != WriteOnly }

// Writable tells whether a wish for the property can be carried out.
func (a Access) Writable() bool { return a == WriteOnly || a == ReadWrite }

// Duration is a time span that reads and writes as text, such as "500ms".
type Duration time.Duration

// Or gives d, or def where d is not set.
func (d Duration) Or(def time.Duration) time.Duration {
	if d <= 0 {
		return def
	}
	return time.Duration(d)
}

// MarshalText writes Go's form, such as "1.5s".
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// UnmarshalText reads Go's form, such as "500ms" or "1m30s".
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil {
		return fmt.Errorf("duration %q: want a number with a unit, such as 500ms or 10s", b)
	}
	*d = Duration(v)
	return nil
}

// Property is one value of a model.
type Property struct {
	Name        string `json:"name"`
	Description string `json:"description,omitempty"`
	Type        Type   `json:"type"`
	Unit        string `json:"unit,omitempty"`
	// Access is ro where it is empty.
	Access Access `json:"access,omitempty"`
	// Min and Max bound numeric values, both inclusive, in the property's unit.
	Min *json.Number `json:"min,omitempty"`
	Max *json.Number `json:"max,omitempty"`
	// Enum lists the only values allowed, written as the property's values are.
	Enum []json.RawMessage `json:"enum,omitempty"`
	// MaxLength bounds string and bytes values, in bytes; 0 is no bound.
	MaxLength int `json:"maxLength,omitempty"`
	// Deadband is the change below which a numeric value is not reported again.
	Deadband float64 `json:"deadband,omitempty"`
	// PollInterval is how often the value is read; 1s where it is not set.
	PollInterval Duration `json:"pollInterval,omitempty"`
	// MaxAge is the age at which a value that could not be read again becomes
	// "bad:stale"; 3 poll intervals where it is not set.
	MaxAge Duration `json:"maxAge,omitempty"`

	// Modbus says where the value lies on a Modbus device.
	Modbus *ModbusProperty `json:"modbus,omitempty"`
}

// ModbusTable is one of the four address spaces of a Modbus device.
type ModbusTable string

// The Modbus tables, in the words of the Modbus application protocol.
const (
	Coil            ModbusTable = "coil"
	DiscreteInput   ModbusTable = "discreteInput"
	InputRegister   ModbusTable = "inputRegister"
	HoldingRegister ModbusTable = "holdingRegister"
)

// ModbusProperty places a property in a Modbus device's tables.
type ModbusProperty struct {
	Table ModbusTable `json:"table"`
	// Address is 0-based, as it travels in the PDU: 0 to 65535.
	Address uint16 `json:"address"`
	// Order is the byte order of values wider than a register: ABCD (the
	// default, big-endian), CDAB, BADC or DCBA.
	Order string `json:"order,omitempty"`
	// Scale and Offset turn a raw number into the value: raw × scale + offset.
	// Scale is 1 where it is not set.
	Scale  *json.Number `json:"scale,omitempty"`
	Offset *json.Number `json:"offset,omitempty"`
	// Raw is the type of the raw number where scale or offset make the
	// property's own type another one; the property's type where it is empty.
	Raw Type `json:"raw,omitempty"`
	// Length is the number of registers of a string, bytes or json property.
	Length uint16 `json:"length,omitempty"`
}

// ModbusDevice says how a Modbus device is reached.
type ModbusDevice struct {
	// Address is host:port of a Modbus TCP slave.
	Address string `json:"address"`
	// Unit is the slave's unit identifier, 0 to 255.
	Unit uint8 `json:"unit,omitempty"`
	// Timeout bounds one request; 1s where it is not set.
	Timeout Duration `json:"timeout,omitempty"`
}

// ModelSpec is the spec of a DeviceModel.
type ModelSpec struct {
	// Protocol is the driver that serves devices of this model: modbus.
	Protocol   string     `json:"protocol"`
	Properties []Property `json:"properties"`
}

// Spec is the spec of a Device.
type Spec struct {
	// NodeName is the edge node the device hangs on.
	NodeName string `json:"nodeName"`
	// Model names a DeviceModel in the device's namespace.
	Model string `json:"model"`
	// Modbus is required where the model's protocol is modbus.
	Modbus *ModbusDevice `json:"modbus,omitempty"`
	// Desired holds the cloud's wishes: property → value.
	Desired map[string]json.RawMessage `json:"desired,omitempty"`
}

// Device is a device with its model resolved: the payload of
// fl/<node>/desired/device/<ns>/<name> and all that a mapper needs.
type Device struct {
	UID string `json:"uid"`
	// Rev grows with every change of the device or its model.
	Rev        int64         `json:"rev"`
	Namespace  string        `json:"namespace"`
	Name       string        `json:"name"`
	Model      string        `json:"model"`
	Protocol   string        `json:"protocol"`
	Modbus     *ModbusDevice `json:"modbus,omitempty"`
	Properties []Property    `json:"properties"`
}

// Key is namespace/name.
func (d *Device) Key() string { return d.Namespace + "/" + d.Name }

// Property finds a property by its name.
func (d *Device) Property(name string) (*Property, bool) {
	for i := range d.Properties {
		if d.Properties[i].Name == name {
			return &d.Properties[i], true
		}
	}
	return nil, false
}

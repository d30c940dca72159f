package modbus_test

import (
	"encoding/json"
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-io/fairlead/mappers/driver"
	"github.com/fairlead-io/fairlead/mappers/modbus"
	"github.com/fairlead-io/fairlead/schemas/device"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/tools/testslave"
)

const everyType = `[
 {"name":"flag","type":"bool","access":"rw","modbus":{"table":"coil","address":3}},
 {"name":"alarm","type":"bool","modbus":{"table":"discreteInput","address":17}},
 {"name":"rb","type":"bool","access":"rw","modbus":{"table":"holdingRegister","address":0}},
 {"name":"i8","type":"int8","access":"rw","modbus":{"table":"holdingRegister","address":1}},
 {"name":"u16","type":"uint16","access":"rw","modbus":{"table":"holdingRegister","address":2}},
 {"name":"i32","type":"int32","access":"rw","modbus":{"table":"holdingRegister","address":3,"order":"CDAB"}},
 {"name":"u64","type":"uint64","access":"rw","modbus":{"table":"holdingRegister","address":5}},
 {"name":"f32","type":"float32","access":"rw","modbus":{"table":"holdingRegister","address":20,"order":"DCBA"}},
 {"name":"f64","type":"float64","access":"rw","modbus":{"table":"holdingRegister","address":22}},
 {"name":"scaled","type":"float64","access":"rw","modbus":{"table":"holdingRegister","address":30,"raw":"int16","scale":0.1}},
 {"name":"text","type":"string","access":"rw","modbus":{"table":"holdingRegister","address":40,"length":8}},
 {"name":"blob","type":"bytes","access":"rw","modbus":{"table":"holdingRegister","address":50,"length":2}},
 {"name":"doc","type":"json","access":"rw","modbus":{"table":"holdingRegister","address":60,"length":10}},
 {"name":"order","type":"uint16","access":"wo","modbus":{"table":"holdingRegister","address":70}},
 {"name":"temp","type":"int16","modbus":{"table":"inputRegister","address":9}}
]`

func openSlave(t *testing.T, properties string) (*testslave.Slave, driver.Session, map[string]*device.Property) {
	t.Helper()
	slave := testslave.Start(t)
	dev := &device.Device{Namespace: "default", Name: "plc", Protocol: modbus.Protocol,
		Modbus: &device.ModbusDevice{Address: slave.Addr, Unit: 1, Timeout: device.Duration(300 * time.Millisecond)}}
	if err := json.Unmarshal([]byte(properties), &dev.Properties); err != nil {
		t.Fatal(err)
	}
	s, err := modbus.New(nil).Open(t.Context(), dev)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	props := map[string]*device.Property{}
	for i := range dev.Properties {
		props[dev.Properties[i].Name] = &dev.Properties[i]
	}
	return slave, s, props
}

func quality(err error) string {
	var f *driver.Fault
	if errors.As(err, &f) {
		return f.Quality
	}
	if err != nil {
		return err.Error()
	}
	return ""
}

// TestEveryTypeAgainstPymodbus writes every type and reads it back through a
// slave that is not ours, and pins some registers as the slave sees them.
func TestEveryTypeAgainstPymodbus(t *testing.T) {
	slave, s, props := openSlave(t, everyType)
	for name, v := range map[string]any{
		"flag": true, "rb": true, "i8": int64(-7), "u16": uint64(65535), "i32": int64(-123456),
		"u64": uint64(1) << 63, "f32": -2.5, "f64": 3.141592653589793, "scaled": -12.3,
		"text": "pump é", "blob": []byte{1, 2, 3, 4}, "doc": json.RawMessage(`{"a":[1,2]}`), "order": uint64(7),
	} {
		back, err := s.Write(t.Context(), props[name], v)
		if diff := cmp.Diff(v, back); diff != "" || err != nil {
			t.Errorf("write %s: %v (-want +got)\n%s", name, err, diff)
		}
		if !props[name].Access.Readable() {
			continue
		}
		r := s.Read(t.Context(), []*device.Property{props[name]})[0]
		if diff := cmp.Diff(v, r.Value); diff != "" || r.Err != nil {
			t.Errorf("read %s: %v (-want +got)\n%s", name, r.Err, diff)
		}
	}
	for _, c := range []struct {
		table string
		addr  int
		want  []uint16
	}{
		{"coil", 3, []uint16{1}},
		{"holding", 1, []uint16{0xfff9}},
		{"holding", 3, []uint16{0x1dc0, 0xfffe}}, // -123456 = fffe1dc0, CDAB
		{"holding", 20, []uint16{0x0000, 0x20c0}},
		{"holding", 30, []uint16{0xff85}},
		{"holding", 70, []uint16{7}},
	} {
		if diff := cmp.Diff(c.want, slave.Get(c.table, c.addr, len(c.want))); diff != "" {
			t.Errorf("%s %d (-want +got)\n%s", c.table, c.addr, diff)
		}
	}
	slave.Set("discrete", 17, 1)
	slave.Set("input", 9, 0xffec)
	for name, want := range map[string]any{"alarm": true, "temp": int64(-20)} {
		if r := s.Read(t.Context(), []*device.Property{props[name]})[0]; r.Value != want || r.Err != nil {
			t.Errorf("%s: got %v, %v; want %v", name, r.Value, r.Err, want)
		}
	}
}

// TestMergedReadIsOneRequest counts requests at the slave.
func TestMergedReadIsOneRequest(t *testing.T) {
	slave, s, props := openSlave(t, `[
	 {"name":"a","type":"uint16","modbus":{"table":"holdingRegister","address":0}},
	 {"name":"b","type":"uint32","modbus":{"table":"holdingRegister","address":4}}]`)
	slave.Set("holding", 0, 1, 0, 0, 0, 0, 2)
	r := s.Read(t.Context(), []*device.Property{props["b"], props["a"]})
	if r[0].Value != uint64(2) || r[1].Value != uint64(1) {
		t.Errorf("got %+v", r)
	}
	if n := slave.Reads("holding", 2); n != 1 { // the gap was read along, once
		t.Errorf("the gap was read %d times; want once", n)
	}
}

// TestOneBadPropertyDoesNotSpoilOthers: an exception to a merged read is
// narrowed down, and what was learnt is kept.
func TestOneBadPropertyDoesNotSpoilOthers(t *testing.T) {
	slave, s, props := openSlave(t, `[
	 {"name":"a","type":"uint16","modbus":{"table":"holdingRegister","address":0}},
	 {"name":"b","type":"uint16","modbus":{"table":"holdingRegister","address":1}},
	 {"name":"c","type":"uint16","modbus":{"table":"holdingRegister","address":2}}]`)
	slave.Set("holding", 0, 10, 11, 12)
	slave.Refuse("holding", 1)
	all := []*device.Property{props["a"], props["b"], props["c"]}
	for range 2 {
		r := s.Read(t.Context(), all)
		if r[0].Value != uint64(10) || r[2].Value != uint64(12) || quality(r[1].Err) != payload.QualityDevice {
			t.Fatalf("got %+v", r)
		}
	}
	before := slave.Reads("holding", 0)
	s.Read(t.Context(), all)
	if n := slave.Reads("holding", 0) - before; n != 1 {
		t.Errorf("address 0 was read %d times; want once, the bad property being known", n)
	}
	slave.Allow("holding", 1)
	if r := s.Read(t.Context(), all); r[1].Value != uint64(11) {
		t.Errorf("allowed again: %+v", r[1])
	}
}

func TestSlaveComesAndGoes(t *testing.T) {
	slave, s, props := openSlave(t, everyType)
	read := func() string {
		r := s.Read(t.Context(), []*device.Property{props["u16"]})[0]
		if r.Err != nil {
			return quality(r.Err)
		}
		return string(props["u16"].Type.Encode(r.Value))
	}
	expect := func(when, want string) {
		t.Helper()
		if got := read(); got != want {
			t.Errorf("%s: got %s; want %s", when, got, want)
		}
	}
	slave.Set("holding", 2, 5)
	expect("at first", "5")
	slave.Pause()
	expect("paused", payload.QualityTimeout)
	slave.Resume()
	expect("resumed", "5")
	slave.Kill()
	expect("killed", payload.QualityUnreachable)
	if _, err := s.Write(t.Context(), props["u16"], uint64(1)); quality(err) != payload.QualityUnreachable {
		t.Errorf("write to a killed slave: %v", err)
	}
	if err := slave.Restart(); err != nil {
		t.Fatal(err)
	}
	slave.Set("holding", 2, 6)
	expect("restarted", "6")
	if err := slave.Restart(); err != nil { // behind the driver's back
		t.Fatal(err)
	}
	slave.Set("holding", 2, 7)
	expect("restarted while idle", "7")
}

func TestWriteRefusedByTheDevice(t *testing.T) {
	slave, s, props := openSlave(t, everyType)
	slave.Refuse("holding", 2)
	_, err := s.Write(t.Context(), props["u16"], uint64(1))
	var f *driver.Fault
	if !errors.As(err, &f) || f.Quality != payload.QualityDevice || f.Retry {
		t.Errorf("write to an address the slave does not have: %v", err)
	}
}

func TestBadConfig(t *testing.T) {
	d := modbus.New(nil)
	for _, m := range []*device.ModbusDevice{nil, {}, {Address: "plc"}, {Address: ":502"}} {
		if _, err := d.Open(t.Context(), &device.Device{Modbus: m}); quality(err) != payload.QualityConfig {
			t.Errorf("%+v: %v", m, err)
		}
	}
	_, s, props := openSlave(t, `[
	 {"name":"good","type":"uint16","modbus":{"table":"holdingRegister","address":0}},
	 {"name":"bad","type":"string","modbus":{"table":"holdingRegister","address":1}}]`)
	r := s.Read(t.Context(), []*device.Property{props["good"], props["bad"]})
	if r[0].Err != nil || quality(r[1].Err) != payload.QualityConfig {
		t.Errorf("got %+v", r)
	}
	if _, err := s.Write(t.Context(), props["bad"], "x"); quality(err) != payload.QualityConfig {
		t.Errorf("write: %v", err)
	}
}

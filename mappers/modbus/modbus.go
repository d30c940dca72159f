package modbus

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/goburrow/modbus"

	"github.com/fairlead-io/fairlead/mappers/driver"
	"github.com/fairlead-io/fairlead/schemas/device"
	"github.com/fairlead-io/fairlead/schemas/payload"
)

// Protocol is the word in a DeviceModel that this driver serves.
const Protocol = "modbus"

// defaultTimeout bounds a request of a device that names no timeout.
const defaultTimeout = time.Second

// silenceLimit is how many requests in a row may go unanswered before the rest
// of a read is given up: a dead device shall not hold its line for a timeout
// per request, and one address that is never answered shall not hide the rest.
const silenceLimit = 2

// New makes the driver. The logger is slog.Default() where it is nil.
func New(log *slog.Logger) driver.Driver {
	if log == nil {
		log = slog.Default()
	}
	d := &modbusDriver{log: log}
	d.mu.lines = map[string]*shared{}
	return d
}

type modbusDriver struct {
	log *slog.Logger
	mu  struct {
		sync.Mutex
		lines map[string]*shared // by address
	}
}

// shared counts the sessions of a line.
type shared struct {
	line
	sessions int
}

func (*modbusDriver) Protocol() string { return Protocol }

// Open checks the description. A property that cannot work does not spoil the
// others: it alone is bad:config.
func (d *modbusDriver) Open(_ context.Context, dev *device.Device) (driver.Session, error) {
	m := dev.Modbus
	if m == nil {
		return nil, driver.ConfigFault("device %s: its modbus block is missing", dev.Key())
	}
	host, port, err := net.SplitHostPort(m.Address)
	if err != nil || host == "" || port == "" {
		return nil, driver.ConfigFault("device %s: modbus address %q: want host:port, such as 192.168.0.7:502", dev.Key(), m.Address)
	}
	s := &session{
		driver: d, unit: m.Unit, timeout: m.Timeout.Or(defaultTimeout),
		codecs: map[string]*codec{}, faults: map[string]error{}, manners: newManners(),
		log: d.log.With("device", dev.Key(), "address", m.Address, "unit", m.Unit),
	}
	for i := range dev.Properties {
		p := &dev.Properties[i]
		if c, err := newCodec(p); err != nil {
			s.log.Error("property cannot be served until its model changes", "property", p.Name, "error", err)
			s.faults[p.Name] = err
		} else {
			s.codecs[p.Name] = c
		}
	}
	s.line = d.acquire(m.Address)
	return s, nil
}

func (d *modbusDriver) acquire(addr string) *line {
	d.mu.Lock()
	defer d.mu.Unlock()
	l := d.mu.lines[addr]
	if l == nil {
		l = &shared{line: line{addr: addr}}
		d.mu.lines[addr] = l
	}
	l.sessions++
	return &l.line
}

// release closes the line with its last session, which has no request under way.
func (d *modbusDriver) release(addr string) {
	d.mu.Lock()
	l := d.mu.lines[addr]
	l.sessions--
	last := l.sessions == 0
	if last {
		delete(d.mu.lines, addr)
	}
	d.mu.Unlock()
	if last {
		l.hangUp()
	}
}

// session is one unit on a line.
type session struct {
	driver  *modbusDriver
	line    *line
	unit    byte
	timeout time.Duration
	log     *slog.Logger
	codecs  map[string]*codec // by property; never changes
	faults  map[string]error  // of properties that cannot work; never changes
	manners manners           // belongs to Read
	first   int               // where the next Read begins in its plan; belongs to Read
}

func (s *session) client(ctx context.Context, urgent bool) modbus.Client {
	return modbus.NewClient2(packager{s.unit}, &request{line: s.line, ctx: ctx, timeout: s.timeout, urgent: urgent})
}

// Close gives the line back.
func (s *session) Close() error {
	s.driver.release(s.line.addr)
	return nil
}

// Read reads the properties in as few requests as may be.
func (s *session) Read(ctx context.Context, props []*device.Property) []driver.Result {
	out := make([]driver.Result, len(props))
	codecs := make([]*codec, len(props))
	for i, p := range props {
		if codecs[i] = s.codecs[p.Name]; codecs[i] == nil {
			out[i].Err = s.faults[p.Name]
			if out[i].Err == nil {
				out[i].Err = driver.ConfigFault("property %s was not there when the device was opened", p.Name)
			}
		}
	}
	blocks := plan(codecs, s.manners)
	silences := 0
	var silence error
	for n := range blocks {
		// Begin elsewhere every time, so that addresses that are never answered
		// do not always come before the others.
		b := blocks[(n+s.first)%len(blocks)]
		if silences >= silenceLimit {
			for _, i := range b.items {
				out[i].Err = silence
			}
			continue
		}
		err := s.readBlock(ctx, b, codecs, out)
		var f *driver.Fault
		switch {
		case errors.As(err, &f) && f.Quality == payload.QualityUnreachable:
			silences, silence = silenceLimit, err // no use dialling again for the rest
		case errors.As(err, &f) && f.Quality == payload.QualityTimeout:
			silences, silence = silences+1, err
		default:
			silences = 0
		}
	}
	s.first++
	return out
}

// readBlock reads a block and spreads its values. Where the device refuses a
// merged block, its properties are read one by one, and what that teaches is
// kept. The error is that of the last request.
func (s *session) readBlock(ctx context.Context, b block, codecs []*codec, out []driver.Result) error {
	reply, err := s.request(ctx, b)
	if err == nil {
		at := time.Now()
		for _, i := range b.items {
			out[i].Value, out[i].Err = extract(codecs[i], b, reply)
			out[i].Time = at
		}
		return nil
	}
	if len(b.items) == 1 || !refusesBlock(err) {
		for _, i := range b.items {
			out[i].Err = err
		}
		return err
	}
	s.log.Debug("device refuses a merged read; reading one by one", "table", b.table, "from", b.addr, "count", b.count, "error", err)
	spoilt := false
	for n, i := range b.items {
		c := codecs[i]
		err = s.readBlock(ctx, block{c.table, c.addr, c.count, []int{i}}, codecs, out)
		if refusesBlock(err) {
			spoilt = true
			s.manners.alone[c.prop.Name] = true
		} else if err != nil {
			for _, j := range b.items[n+1:] {
				out[j].Err = err
			}
			return err
		}
	}
	if !spoilt { // each by itself is fine: it was the gap
		for _, i := range b.items {
			s.manners.tight[codecs[i].prop.Name] = true
		}
	}
	return nil
}

// request reads a block and checks that the reply is as long as was asked.
func (s *session) request(ctx context.Context, b block) (reply []byte, err error) {
	c := s.client(ctx, false)
	want := 2 * int(b.count)
	switch b.table {
	case device.Coil:
		reply, err = c.ReadCoils(b.addr, b.count)
		want = (int(b.count) + 7) / 8
	case device.DiscreteInput:
		reply, err = c.ReadDiscreteInputs(b.addr, b.count)
		want = (int(b.count) + 7) / 8
	case device.InputRegister:
		reply, err = c.ReadInputRegisters(b.addr, b.count)
	case device.HoldingRegister:
		reply, err = c.ReadHoldingRegisters(b.addr, b.count)
	}
	if err != nil {
		return nil, fault(err)
	}
	if len(reply) != want {
		return nil, malformed("reply of %d bytes to a request for %d", len(reply), want)
	}
	return reply, nil
}

func extract(c *codec, b block, reply []byte) (any, error) {
	off := int(c.addr - b.addr)
	if c.bits() {
		return reply[off/8]>>(off%8)&1 == 1, nil
	}
	return c.decode(reply[2*off : 2*(off+int(c.count))])
}

// Write writes one property and reads it back; it goes ahead of reads that wait
// for the line.
func (s *session) Write(ctx context.Context, p *device.Property, v any) (any, error) {
	c := s.codecs[p.Name]
	if c == nil {
		return nil, s.faults[p.Name]
	}
	client := s.client(ctx, true)
	want, err := c.encode(v)
	if err != nil {
		return nil, err
	}
	switch {
	case c.bits():
		state := uint16(0)
		if v == true {
			state = 0xFF00
		}
		_, err = client.WriteSingleCoil(c.addr, state)
	case c.count == 1:
		_, err = client.WriteSingleRegister(c.addr, uint16(want[0])<<8|uint16(want[1]))
	default:
		_, err = client.WriteMultipleRegisters(c.addr, c.count, want)
	}
	if err != nil {
		return nil, fault(err)
	}
	if !p.Access.Readable() {
		return v, nil
	}
	return s.readBack(client, c, v, want)
}

func (s *session) readBack(client modbus.Client, c *codec, v any, want []byte) (any, error) {
	var got []byte
	var err error
	var now any
	same := false
	if c.bits() {
		if got, err = client.ReadCoils(c.addr, 1); err != nil {
			return nil, fault(err)
		}
		if len(got) != 1 {
			return nil, malformed("reply of %d bytes to a request for 1", len(got))
		}
		now = got[0]&1 == 1
		same = now == v
	} else {
		if got, err = client.ReadHoldingRegisters(c.addr, c.count); err != nil {
			return nil, fault(err)
		}
		same = bytes.Equal(got, want)
		if now, err = c.decode(got); err != nil {
			now = nil
		}
	}
	if !same {
		return now, &driver.Fault{Quality: payload.QualityDevice, Reason: driver.ReasonReadback,
			Err: fmt.Errorf("property %s: the device holds %v after %v was written", c.prop.Name, now, v)}
	}
	return now, nil
}

// refusesBlock tells whether an exception may be due to one address or to the
// size of a block. (MODBUS Application Protocol V1.1b3, section 7)
func refusesBlock(err error) bool {
	var e *modbus.ModbusError
	if !errors.As(err, &e) {
		return false
	}
	switch e.ExceptionCode {
	case modbus.ExceptionCodeIllegalDataAddress, modbus.ExceptionCodeIllegalDataValue, modbus.ExceptionCodeServerDeviceFailure:
		return true
	}
	return false
}

// fault gives an error of goburrow's client its fate. A *[modbus.ModbusError]
// stays within reach of errors.As.
func fault(err error) error {
	var f *driver.Fault
	if errors.As(err, &f) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	f = &driver.Fault{Quality: payload.QualityDevice, Err: err}
	var e *modbus.ModbusError
	if errors.As(err, &e) {
		switch e.ExceptionCode {
		case modbus.ExceptionCodeIllegalFunction:
			f.Reason = device.ReasonAccess
		case modbus.ExceptionCodeIllegalDataValue:
			f.Reason = device.ReasonRange
		case modbus.ExceptionCodeAcknowledge, modbus.ExceptionCodeServerDeviceBusy:
			f.Retry = true
		case modbus.ExceptionCodeGatewayPathUnavailable:
			f.Quality = payload.QualityUnreachable
		case modbus.ExceptionCodeGatewayTargetDeviceFailedToRespond:
			f.Quality = payload.QualityTimeout
		}
	}
	return f
}

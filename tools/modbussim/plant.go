package modbussim

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"sync"
	"time"
)

// Version is what the plant's firmware register says.
const Version = "PS-200 v1.4.2"

// The tables' sizes: addresses from here on do not exist.
const (
	Coils            = 1
	DiscreteInputs   = 2
	InputRegisters   = 12
	HoldingRegisters = 8
)

const (
	ramp       = 5.0  // per cent of speed that the motor gains or loses in a second
	nominal    = 6.0  // bar at full speed with the outlet closed
	fullFlow   = 90.0 // m³/h at full speed
	inflow     = 45.0 // m³/h into the sump, on average
	sumpVolume = 20.0 // m³
	ambient    = 18.0 // °C
	lowLevel   = 15.0 // per cent: below it the pump runs dry
	hot        = 75.0 // °C
)

// Plant is the physics: a sump that fills, and a pump that empties it at a
// speed that follows its setpoint. The same seed and steps give the same
// values. Its methods may be called from several goroutines.
type Plant struct {
	mu struct {
		sync.Mutex
		rand     *rand.Rand
		on       bool
		setpoint uint16  // %
		speed    float64 // %
		pressure float64 // bar
		flow     float64 // m³/h
		level    float64 // %
		temp     float64 // °C
		hours    float64
		elapsed  float64 // s
	}
}

// NewPlant gives a plant that runs at 60 %.
func NewPlant(seed uint64) *Plant {
	p := &Plant{}
	p.mu.rand = rand.New(rand.NewPCG(seed, 0))
	p.mu.on, p.mu.setpoint, p.mu.speed = true, 60, 60
	p.mu.level, p.mu.temp, p.mu.hours = 55, 41, 12345.67
	p.stepLocked(0)
	return p
}

// Step lets time pass.
func (p *Plant) Step(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stepLocked(d.Seconds())
}

func (p *Plant) stepLocked(s float64) {
	m := &p.mu
	m.elapsed += s
	want := 0.0
	if m.on {
		want = float64(m.setpoint)
	}
	m.speed += min(max(want-m.speed, -ramp*s), ramp*s)
	noise := func(size float64) float64 { return size * (2*m.rand.Float64() - 1) }
	ratio := m.speed / 100
	wave := math.Sin(2 * math.Pi * m.elapsed / 90) // the consumers' demand
	m.flow = max(0, ratio*fullFlow*(1+0.05*wave)+ratio*noise(0.4))
	m.pressure = max(0, nominal*ratio*ratio*(1-0.08*wave)+ratio*noise(0.02))
	in := inflow * (1 + 0.3*math.Sin(2*math.Pi*m.elapsed/240))
	m.level = min(max(m.level+(in-m.flow)/3600*s/sumpVolume*100, 0), 100)
	goal := ambient + 45*ratio
	if m.level < lowLevel {
		goal += 30 * ratio
	}
	m.temp += (goal - m.temp) * (1 - math.Exp(-s/60))
	if m.speed > 0 {
		m.hours += s / 3600
	}
}

func (p *Plant) alarmLocked() bool {
	return p.mu.temp > hot || p.mu.level < lowLevel && p.mu.speed > 0
}

// String says how the plant is, for a person.
func (p *Plant) String() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return fmt.Sprintf("on %t, setpoint %d %%, speed %.1f %%, pressure %.3f bar, flow %.2f m³/h, level %.2f %%, motor %.2f °C, %.2f h",
		p.mu.on, p.mu.setpoint, p.mu.speed, p.mu.pressure, p.mu.flow, p.mu.level, p.mu.temp, p.mu.hours)
}

// The tables as they are now: bits, or registers as they travel.
func (p *Plant) coils() []bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return []bool{p.mu.on}
}

func (p *Plant) discreteInputs() []bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return []bool{p.alarmLocked(), p.mu.speed > 0}
}

func (p *Plant) inputRegisters() []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	b := make([]byte, 0, 2*InputRegisters)
	b = binary.BigEndian.AppendUint32(b, math.Float32bits(float32(p.mu.pressure)))
	b = binary.BigEndian.AppendUint32(b, math.Float32bits(float32(p.mu.flow)))
	b = binary.BigEndian.AppendUint16(b, uint16(math.Round(p.mu.level*10)))
	b = binary.BigEndian.AppendUint16(b, uint16(int16(math.Round(p.mu.temp*10))))
	b = binary.BigEndian.AppendUint16(b, uint16(math.Round(p.mu.speed*10)))
	b = binary.BigEndian.AppendUint16(b, 0) // reserved
	b = binary.BigEndian.AppendUint32(b, uint32(p.mu.hours*100))
	return append(b, 0, 0, 0, 0) // reserved
}

func (p *Plant) holdingRegisters() []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	b := binary.BigEndian.AppendUint16(nil, p.mu.setpoint)
	return append(b, firmware[:]...)
}

// firmware fills holding registers 1 to 7.
var firmware = func() (b [2 * (HoldingRegisters - 1)]byte) {
	copy(b[:], Version)
	return b
}()

// setCoil switches the pump; ok is false for an address that does not exist.
func (p *Plant) setCoil(addr int, on bool) (ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if addr == 0 {
		p.mu.on = on
	}
	return addr == 0
}

// setRegister takes a setpoint of 0 to 100; everything else gives the exception
// that a real plant would answer.
func (p *Plant) setRegister(addr int, v uint16) (exception byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case addr != 0:
		return illegalAddress
	case v > 100:
		return illegalValue
	}
	p.mu.setpoint = v
	return 0
}

package driver

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/fairlead-io/fairlead/schemas/device"
	"github.com/fairlead-io/fairlead/schemas/payload"
)

// Driver speaks one protocol. It is called from several goroutines.
type Driver interface {
	// Protocol is the word in a DeviceModel's spec.protocol, such as "modbus".
	Protocol() string
	// Open prepares to serve a device. It checks the description and must not
	// wait for the device: an error means that the description cannot work and
	// is final until the device changes. The driver may keep d, which nobody
	// changes. One device has at most one open session.
	Open(ctx context.Context, d *device.Device) (Session, error)
}

// Session serves one open device.
//
// Read is never called twice at a time, nor is Write, but a Write may come
// while a Read is under way: the session lets it go first where the protocol
// allows. Both return soon after ctx ends.
type Session interface {
	// Read reads the properties together, as few requests as the protocol
	// allows, and gives one result for each, in their order. It blocks for as
	// long as the device takes, bounded by the device's timeout per request.
	Read(ctx context.Context, props []*device.Property) []Result
	// Write writes a value that [device.Property.Decode] gave, and reads it
	// back where the property can be read. readback is what the device holds
	// now, or the value written where it cannot be read. A readback that is not
	// what was written comes with a *[Fault] of [ReasonReadback].
	Write(ctx context.Context, p *device.Property, v any) (readback any, err error)
	// Close gives the device's resources back. No call is under way.
	Close() error
}

// Result is what reading one property gave.
type Result struct {
	// Value is a native value of the property's type, as [device.Property.Decode]
	// describes them. The kit owns it.
	Value any
	// Time is when the value was true; the time Read returned where it is zero.
	Time time.Time
	// Err is why there is no value, best a *[Fault].
	Err error
}

// Reasons that occur at the device, beside those of package device.
const (
	ReasonReadback device.Reason = "readback" // the device holds another value than the one written
	ReasonConfig   device.Reason = "config"   // the description cannot work
)

// Fault is an error with its fate: the quality word that a failed read travels
// as and the reason that a failed write travels as.
type Fault struct {
	// Quality is one of the words of package payload, such as [payload.QualityTimeout].
	Quality string
	// Reason goes into the twin's "err" where a write cannot succeed;
	// "device" where it is empty.
	Reason device.Reason
	// Retry marks a fault that passes by itself, such as a busy device.
	// Timeouts and unreachable devices always count as such.
	Retry bool
	// Err is the cause. Its text should not vary from one time to the next.
	Err error
}

func (f *Fault) Error() string {
	if f.Err == nil {
		return f.Quality
	}
	return f.Err.Error()
}

// Unwrap gives the cause.
func (f *Fault) Unwrap() error { return f.Err }

// silent tells whether the device did not answer at all.
func (f *Fault) silent() bool {
	return f.Quality == payload.QualityTimeout || f.Quality == payload.QualityUnreachable
}

// transient tells whether the same write may succeed later.
func (f *Fault) transient() bool { return f.Retry || f.silent() }

func (f *Fault) reason() device.Reason {
	if f.Reason == "" {
		return device.ReasonDevice
	}
	return f.Reason
}

// ConfigFault is the fault of a property or device whose description cannot work.
func ConfigFault(format string, args ...any) *Fault {
	return &Fault{Quality: payload.QualityConfig, Reason: ReasonConfig, Err: fmt.Errorf(format, args...)}
}

// faultOf finds the fate of an error that a driver gave.
func faultOf(err error) *Fault {
	var f *Fault
	if errors.As(err, &f) {
		return f
	}
	var v *device.ValueError
	if errors.As(err, &v) {
		return &Fault{Quality: payload.QualityValue, Reason: v.Reason, Err: err}
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return &Fault{Quality: payload.QualityTimeout, Err: err}
	}
	return &Fault{Quality: payload.QualityDevice, Err: err}
}
